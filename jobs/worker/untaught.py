"""Which trained parameters a loss does not depend on: training leaves them as they are, but for weight decay."""

from __future__ import annotations

import torch

NAMED = 5
"""So many are named; the others are counted."""


def remarks(loss: torch.Tensor, model: torch.nn.Module) -> list[str]:
    """Say which parameters the gradient of `loss`, a scalar (), cannot reach; nothing where there is none."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    reached = _reached(loss)
    names = [name for name, parameter in trained if id(parameter) not in reached]
    if not names:
        return []
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return [
        f"the loss of the first rows does not depend on {len(names)} of {len(trained)} trained parameters, so nothing "
        f"taught them there: {', '.join(names[:NAMED])}{more}"
    ]


def _reached(loss: torch.Tensor) -> set[int]:
    """Return the ids of the leaves in the graph behind `loss`."""
    seen, found = set(), set()
    ahead = [loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found.add(id(getattr(node, "variable", None)))  # AccumulateGrad, the end of a path, holds a parameter
        ahead += [following for following, _ in node.next_functions]
    return found
