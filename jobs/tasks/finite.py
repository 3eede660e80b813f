"""Answers are finite: what a model makes NaN or infinity of is refused, where a best guess would be as good as any."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.tasks import TaskError

if TYPE_CHECKING:
    import torch


def finite(found: torch.Tensor) -> torch.Tensor:
    """Return what a model has made of B inputs, (B, …), where all of it is finite.

    Whoever asks for several answers at once asks again for each: so only the input at fault is refused.

    Raises:
        TaskError: something is NaN or infinite.
    """
    if not found.isfinite().all():
        raise TaskError(
            "the model makes NaN or infinite numbers of this input, so that it has no answer to it: the input is far "
            "from what it was trained on, or precision fp32 is needed"
        )
    return found
