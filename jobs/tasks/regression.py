"""How good guesses of numbers are: sums that add up over batches and ranks, metrics out of them, a picture.

What is guessed is standardised for the network, and measured on its own scale. A guess may be of A numbers at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.tasks import TaskError
from jobs.tasks.pictures import png
from jobs.tasks.scores import array

if TYPE_CHECKING:
    import torch

DRAWN = 4_000
"""Points of a picture; of more rows every n-th is drawn."""


@dataclass(frozen=True)
class Standard:
    """The mean and the deviation of A numbers that are to be guessed, over the training rows."""

    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    @classmethod
    def of(cls, values: np.ndarray, names: Sequence[str]) -> Standard:
        """Learn from values (n, A) float64.

        Raises:
            TaskError: one is always the same, so that there is nothing to learn.
        """
        deviation = values.std(0)
        for name, low, high in zip(names, values.min(0), values.max(0), strict=True):
            if low == high:
                raise TaskError(f"column {name!r} is {low:g} in every row: there is nothing to learn")
        return cls(tuple(values.mean(0).tolist()), tuple(np.maximum(deviation, np.finfo(float).tiny).tolist()))

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Standardise values (N, A) float64; float32."""
        return ((values - np.array(self.mean)) / np.array(self.deviation)).astype(np.float32)

    def undone(self, values: np.ndarray) -> np.ndarray:
        """Return standardised values (N, A) on their own scale, float64."""
        return values.astype(np.float64) * np.array(self.deviation) + np.array(self.mean)


def sums(guesses: torch.Tensor, truths: torch.Tensor, standard: Standard) -> dict[str, torch.Tensor]:
    """Sum what RMSE and R2 are made of.

    Args:
        guesses: (B, A) fp32, standardised.
        truths: (B, A) fp32, standardised.

    Returns:
        squared_error, truth and truth_square, each (A,) float64, on the numbers' own scale about their training mean.
    """
    import torch

    scale = torch.tensor(standard.deviation, dtype=torch.float64, device=guesses.device)
    guess, truth = guesses.double() * scale, truths.double() * scale
    return {
        "squared_error": ((guess - truth) ** 2).sum(0),
        "truth": truth.sum(0),
        "truth_square": (truth**2).sum(0),
    }


def metrics(flat: Mapping[str, Any]) -> dict[str, float]:
    """Return RMSE and R2 of added-up sums, their mean where several numbers are guessed.

    R2 is left out where the truths are all the same: it has no value then.
    """
    count = max(flat["targets"], 1)
    errors, truth, squares = (array(flat, name) for name in ("squared_error", "truth", "truth_square"))
    variation = squares - truth**2 / count
    varied = variation > 1e-12 * np.maximum(squares, 1e-300)
    found = {"rmse": float(np.sqrt(errors / count).mean())}
    if varied.any():
        found["r2"] = float((1 - errors[varied] / variation[varied]).mean())
    return found


def picture(guesses: np.ndarray, truths: np.ndarray, names: Sequence[str]) -> bytes:
    """Draw guesses against truths, both (N, A), and what is left between them: a PNG with a row for each of A."""
    from matplotlib.figure import Figure

    step = -(-len(guesses) // DRAWN)
    guesses, truths = guesses[::step], truths[::step]
    figure = Figure(figsize=(8, 3.5 * len(names)), layout="constrained")
    for row, name in enumerate(names):
        guess, truth = guesses[:, row], truths[:, row]
        left = figure.add_subplot(len(names), 2, 2 * row + 1, xlabel=f"{name}", ylabel="predicted")
        left.plot([truth.min(), truth.max()], [truth.min(), truth.max()], color="grey", linewidth=1)
        left.scatter(truth, guess, s=8, alpha=0.5)
        right = figure.add_subplot(len(names), 2, 2 * row + 2, xlabel="predicted", ylabel="residual")
        right.axhline(0, color="grey", linewidth=1)
        right.scatter(guess, truth - guess, s=8, alpha=0.5)
    return png(figure)
