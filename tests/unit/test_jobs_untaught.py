"""A parameter that the loss does not depend on is named: it would be exported as it began."""

import torch
from torch.utils.checkpoint import checkpoint

from jobs.worker import untaught


class Model(torch.nn.Module):
    """Two layers that are used, the second computed again in the backward pass, and some that are not."""

    def __init__(self, unused: int) -> None:
        super().__init__()
        self.first, self.second, self.frozen = (torch.nn.Linear(3, 3) for _ in range(3))
        self.frozen.requires_grad_(False)
        self.unused = torch.nn.ModuleList(torch.nn.Linear(3, 3, bias=False) for _ in range(unused))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return a scalar for x (B, 3)."""
        hidden = checkpoint(self.second, self.first(x), use_reentrant=False)
        return hidden.square().sum()


def test_a_model_all_of_which_learns_needs_no_remark() -> None:
    model = Model(0)
    assert untaught.remarks(model(torch.ones(2, 3)), model) == []


def test_what_does_not_is_named_and_counted() -> None:
    model = Model(7)
    (said,) = untaught.remarks(model(torch.ones(2, 3)), model)
    assert "7 of 11 trained parameters" in said
    assert said.endswith(
        "unused.0.weight, unused.1.weight, unused.2.weight, unused.3.weight, unused.4.weight and 2 more"
    )
