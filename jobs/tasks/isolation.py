"""Does a model keep pieces apart that are packed into one row? Found by running it, whatever its architecture.

A causal model that is told positions which restart should treat each piece as if it were alone. Many do not: those
without attention masks of their own, with learned or no positions, or with a state that runs along the row.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

TOKENS = 12
"""Length of each of the two pieces, at most."""
TOLERANCE = 1e-4
"""For the Euclidean norm of the difference over that of the logits, beyond four times what rounding makes of it."""


def leak(model: torch.nn.Module, longest: int) -> float | None:
    """Return by how much the second of two packed pieces sees the first, relative to its logits; None where not at all.

    Weights, mode and random state are left as they are. inf: the model takes no positions.

    Args:
        model: a whole causal language model, on one device.
        longest: tokens that it takes in a row.
    """
    import torch

    if not _takes_positions(model):
        return float("inf")
    length = max(2, min(TOKENS, longest // 2))
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            first, second, packed = _logits_apart_and_packed(model, length)
    finally:
        model.train(was_training)
    noise, error = _distance(packed[:length], first), _distance(packed[length:], second)
    return error if not error < TOLERANCE + 4 * noise else None


def _logits_apart_and_packed(model: torch.nn.Module, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the logits of both pieces alone, (length, V) each, and in one row, (2·length, V), in fp32."""
    import torch

    device = next(model.parameters()).device
    vocabulary = int(model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (1, 2 * length), generator=generator).to(device)
    places = torch.arange(length, device=device)[None]
    first, second = (model(input_ids=piece, use_cache=False).logits[0].float() for piece in tokens.split(length, dim=1))
    both = torch.cat([places, places], dim=1)
    return first, second, model(input_ids=tokens, position_ids=both, use_cache=False).logits[0].float()


def _takes_positions(model: Any) -> bool:
    parameters = inspect.signature(model.forward).parameters
    return "position_ids" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())
