"""Does a model see tokens that come later? One that does learns to copy its targets. Found by running it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.tasks import TaskError

if TYPE_CHECKING:
    import torch

TOKENS = 24
"""Length of the rows that are compared, at most."""
ROUNDING = 1e-5
"""Of 140 architectures with small random weights, those that see ahead showed 1.6e-4 to 0.9, the others 0 to 2.2e-7
(benchmarks/causality.py)."""


def check(model: torch.nn.Module, longest: int) -> None:
    """Refuse a model that would learn to copy what it is to predict.

    Raises:
        TaskError: it sees tokens that come later.
    """
    # What is no model of transformers' own make is its author's business.
    if hasattr(model, "get_input_embeddings") and sees_ahead(model, longest):
        raise TaskError(
            f"{type(model).__name__} sees the tokens that it is to predict, and would learn to copy them: it is no "
            "causal model as it is configured. Where its config has is_decoder, set model.config {is_decoder: true}; "
            "otherwise choose another architecture"
        )


def sees_ahead(model: torch.nn.Module, longest: int) -> bool:
    """Tell whether the logits of a row's first half depend on its second half.

    Weights, mode and random state are left as they are.

    Args:
        model: a whole language model, on one device.
        longest: tokens that it takes in a row.
    """
    import torch

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return influence(model, max(1, min(TOKENS, longest) // 2)) > _tolerance(model)
    finally:
        model.train(was_training)


def influence(model: torch.nn.Module, half: int) -> float:
    """Return by how much the first half's logits move with the second half, relative to their Euclidean norm."""
    import torch

    vocabulary = vocabulary_of(model)
    generator = torch.Generator().manual_seed(0)
    first, second, other = torch.randint(vocabulary, (3, 1, half), generator=generator)
    device = next(model.parameters()).device

    def logits(end: torch.Tensor) -> torch.Tensor:
        """Return the first half's logits (half, V) in fp32, in a row that ends in `end` (1, half)."""
        row = torch.cat([first, end], dim=1).to(device)
        return model(input_ids=row, use_cache=False).logits[0, :half].float()

    expected = logits(second)
    return float((logits(other) - expected).norm() / expected.norm())


def vocabulary_of(model: torch.nn.Module) -> int:
    """Return how many tokens a language model knows."""
    weight = model.get_input_embeddings().weight  # type: ignore[operator]  # adapted ones have it too
    return int(getattr(weight, "ds_shape", weight.shape)[0])  # whole, where this process has a part of it


def _tolerance(model: torch.nn.Module) -> float:
    """Return what rounding may make of it: none, since the same sums are made, but where tokens choose experts."""
    import torch

    if not any("expert" in key for key in model.config.to_dict()):  # type: ignore[operator, union-attr]
        return ROUNDING
    dtype = next((p.dtype for p in model.parameters() if p.dtype.is_floating_point), torch.float32)
    return ROUNDING + 8 * torch.finfo(dtype).eps
