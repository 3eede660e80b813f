"""Does a model keep pieces apart that are packed into one row? Found by running it, whatever its architecture.

A causal model that is told positions which restart should treat each piece as if it were alone. Many do not: those
without attention masks of their own, with learned or no positions, or with a state that runs along the row.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from jobs.tasks import causality

if TYPE_CHECKING:
    import torch

TOKENS = 12
"""Length of each of the two pieces, at most."""
TOLERANCE = 1e-4
"""Between a piece packed and alone: for the Euclidean norm of the difference over that of the logits, beyond four times
what rounding makes of it."""
INFLUENCE = 1e-6
"""Between a piece behind one other and the same behind another: there the same sums are made, and rounding is none."""


def leak(model: torch.nn.Module, longest: int, *, told: bool = False) -> float | None:
    """Return by how much the second of two packed pieces sees the first, relative to its logits; None where not at all.

    Weights, mode and random state are left as they are. inf: the model takes no positions.

    Args:
        model: a whole causal language model, on one device.
        longest: tokens that it takes in a row.
        told: it is told where pieces end in place of a mask (jobs/tasks/packed_attention.py).
    """
    import torch

    if not _takes_positions(model):
        return float("inf")
    length = max(2, min(TOKENS, longest // 2))
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return _difference(model, length, told)
    finally:
        model.train(was_training)


def remark(model: torch.nn.Module) -> str:
    """Return the sentence for the job's log on a model that lets packed pieces see each other."""
    return (
        f"{type(model).__name__} lets what is packed into one row see what stands before it: each conversation is a "
        "row of its own in the batches, padded to the longest of them, which is slower and may take more memory "
        "(task.pack: false keeps to micro_batch_size rows)"
    )


def _difference(model: torch.nn.Module, length: int, told: bool) -> float | None:
    import torch

    device = next(model.parameters()).device
    vocabulary = causality.vocabulary_of(model)
    generator = torch.Generator().manual_seed(0)
    first, second, other = torch.randint(vocabulary, (3, 1, length), generator=generator).to(device)
    places = torch.arange(length, device=device)[None]

    def logits(*pieces: torch.Tensor) -> torch.Tensor:
        """Return the logits of one row of pieces, each (1, length): (length of all, V) in fp32."""
        packed = {} if len(pieces) == 1 else {"position_ids": torch.cat([places] * len(pieces), dim=1)}
        if packed and told:
            ends = torch.arange(1, len(pieces) + 1, dtype=torch.int32, device=device) * length
            packed["attention_mask"] = ends[None, None, None]
        return model(input_ids=torch.cat(pieces, dim=1), use_cache=False, **packed).logits[0].float()

    behind_first, behind_other = logits(first, second), logits(other, second)[length:]
    noise = _distance(behind_first[:length], logits(first))
    error = _distance(behind_first[length:], logits(second))
    influence = _distance(behind_first[length:], behind_other)
    return max(error, influence) if influence > INFLUENCE or not error < TOLERANCE + 4 * noise else None


def _takes_positions(model: Any) -> bool:
    parameters = inspect.signature(model.forward).parameters
    return "position_ids" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())
