"""A network as one graph: it answers what the network answers, or the network stays as it is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from jobs.tasks import frozen, get
from jobs.tasks.frozen import Frozen


def a_policy(shape: tuple[int, ...]) -> Any:
    """Return the task, fitted to steps with observations of this shape."""
    draw = np.random.default_rng(0)
    made = get("policy")({})
    steps = [{"observation": draw.normal(size=shape).tolist(), "action": ["up", "down"][i % 2]} for i in range(64)]
    made.fit(made.observe(steps))
    return made


@pytest.mark.parametrize(
    ("architecture", "shape", "config"),
    [
        ("mlp", (3,), {"hidden_size": 16, "layers": 2}),
        ("mlp", (1,), {"hidden_size": 16, "layers": 1, "frequencies": 0}),
        ("policy-cnn", (12, 10), {}),
        ("policy-cnn", (12, 10, 3), {}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_served_policy_is_a_graph_that_answers_as_the_network(
    architecture: str, shape: tuple[int, ...], config: dict[str, Any], dtype: torch.dtype
) -> None:
    made = a_policy(shape)
    torch.manual_seed(1)
    model = made.build(architecture, config).to(dtype).eval()
    served = made.served_model(model)
    assert isinstance(served, Frozen)
    for count in (1, 3, 8):
        states = [np.random.default_rng(count + at).normal(size=shape).clip(-1, 1) for at in range(count)]
        expected, found = made.predict(model, states), made.predict(served, states)
        for one, other in zip(expected, found, strict=True):
            assert one["scores"] == pytest.approx(other["scores"], abs=1e-3 if dtype == torch.float32 else 2e-2)


class Branching(torch.nn.Module):
    """A network whose way depends on its input: its graph would know the one way only."""

    def __init__(self) -> None:
        super().__init__()
        self.config = None
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, numbers: torch.Tensor) -> Any:
        return SimpleNamespace(logits=numbers * self.scale if float(numbers.sum()) > 0 else numbers - self.scale)


class Untraceable(Branching):
    """A network that cannot be a graph."""

    def forward(self, numbers: torch.Tensor) -> Any:
        return SimpleNamespace(logits=numbers.tolist())


@pytest.mark.parametrize("network", [Branching, Untraceable])
def test_a_network_that_is_no_graph_stays_as_it_is(network: type[torch.nn.Module]) -> None:
    model = network().eval()
    assert frozen.frozen(model, {"numbers": torch.zeros(1, 4)}) is model


def test_inputs_of_other_names_go_to_the_network() -> None:
    made = a_policy((3,))
    model = made.build("mlp", {"hidden_size": 16, "layers": 1}).eval()
    served = made.served_model(model)
    batch = {"numbers": torch.ones(2, 3), "missing": torch.ones(2, 3)}
    assert torch.equal(served(**batch).logits, model(**batch).logits)
    assert not torch.allclose(served(**batch).logits, served(numbers=batch["numbers"]).logits)
