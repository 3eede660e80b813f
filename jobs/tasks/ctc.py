"""Connectionist temporal classification (Graves et al. 2006): its loss, and what a best path says and when."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def loss(
    log_probabilities: torch.Tensor, frames: torch.Tensor, labels: torch.Tensor, lengths: torch.Tensor, blank: int
) -> torch.Tensor:
    """Return the summed loss () fp32, in nats. A recording too short for its transcript adds 0, and no gradient.

    Args:
        log_probabilities: (B, F, symbols) fp32.
        frames: (B,) int64, how many of F are within each recording.
        labels: (B, L) int64.
        lengths: (B,) int64, how many of L are the transcript's.
    """
    import torch

    summed: torch.Tensor = torch.nn.functional.ctc_loss(
        log_probabilities.transpose(0, 1), labels, frames, lengths, blank=blank, reduction="sum", zero_infinity=True
    )
    return summed


def best_paths(log_probabilities: torch.Tensor, frames: torch.Tensor) -> list[list[int]]:
    """Return the most likely symbol of each frame, for each recording's own `frames` (B,) of (B, F, symbols)."""
    best = log_probabilities.argmax(-1).tolist()
    return [path[:count] for path, count in zip(best, frames.tolist(), strict=True)]


def confidences(log_probabilities: torch.Tensor, frames: torch.Tensor) -> list[float]:
    """Return the geometric mean of the best symbols' probabilities over each recording's frames (B,): 0 to 1."""
    best = log_probabilities.max(-1).values
    inside = best.new_tensor(range(best.shape[1])) < frames.unsqueeze(1)
    return ((best * inside).sum(1) / frames).exp().tolist()


def onsets(path: list[int], blank: int) -> list[tuple[int, int]]:
    """Return (frame, symbol) where each symbol of a best path begins: its alignment, as far as CTC has one."""
    return [(at, s) for at, s in enumerate(path) if s != blank and (at == 0 or path[at - 1] != s)]
