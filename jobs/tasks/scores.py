"""How good a model is: sums that add up over batches and ranks, metrics out of them, a picture of mistakes."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from jobs.tasks import IGNORED

if TYPE_CHECKING:
    import torch

BINS = 15
"""Bins of confidence, as in Guo et al. 2017."""
OF_TOKENS = ("loss", "perplexity", "accuracy", "bits_per_byte")
"""What `of_tokens` returns."""
DRAWN = 60
"""With more labels than this there is no picture: nobody could read it."""


def sums(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Count guesses by label and by confidence.

    Args:
        logits: (B, C) fp32.
        labels: (B,) int64.

    Returns:
        confusion (C, C): true label by guess; bins (3, BINS): guesses, their summed confidence, and how many are right.
    """
    import torch

    classes = logits.shape[1]
    confidence, guesses = logits.softmax(-1).max(-1)
    confusion = torch.bincount(labels * classes + guesses, minlength=classes * classes).reshape(classes, classes)
    at = (confidence * BINS).ceil().long().clamp(1, BINS) - 1  # a bin holds its upper edge
    bins = torch.zeros(3, BINS, dtype=torch.float64, device=logits.device)
    for row, value in enumerate((torch.ones_like(confidence), confidence, guesses == labels)):
        bins[row].index_add_(0, at, value.double())
    return {"confusion": confusion, "bins": bins}


def array(flat: Mapping[str, float], name: str) -> np.ndarray:
    """Return the elements `name.0`, `name.1`, … of added-up sums, float64 [n]."""
    return np.array([flat[f"{name}.{i}"] for i in range(sum(key.startswith(f"{name}.") for key in flat))])


def confusion(flat: Mapping[str, float]) -> np.ndarray:
    """Return the counts (C, C), true label by guess."""
    counts = array(flat, "confusion")
    return counts.reshape(2 * [round(len(counts) ** 0.5)])


def macro_f1(counts: np.ndarray) -> float:
    """Return the mean F1 over the labels that occur, as a truth or as a guess, in counts (C, C)."""
    right, truths, guesses = counts.diagonal(), counts.sum(1), counts.sum(0)
    occurs = truths + guesses > 0
    return float((2 * right[occurs] / (truths + guesses)[occurs]).mean()) if occurs.any() else 0.0


def calibration_error(bins: np.ndarray) -> float:
    """Return the expected calibration error: the mean of |accuracy − confidence| over bins, weighted by guesses.

    Guo et al. 2017, On Calibration of Modern Neural Networks (arXiv:1706.04599), equation 3, with bins of equal width.

    Args:
        bins: (3, BINS) guesses, summed confidence, right guesses.
    """
    guesses, confidence, right = bins
    return float(np.abs(right - confidence).sum() / max(guesses.sum(), 1))


def picture(counts: np.ndarray, labels: Sequence[str]) -> bytes:
    """Draw counts (C, C), true label by guess, as a PNG: each row's shares as shades, the counts as numbers."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = max(3.0, 0.45 * len(labels) + 1.5)
    figure = Figure(figsize=(size, size), layout="constrained")
    axes = figure.add_subplot(xlabel="guess", ylabel="label")
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(labels)), labels, rotation=90)
    axes.set_yticks(range(len(labels)), labels)
    for (row, column), count in np.ndenumerate(counts):
        shade = "white" if shares[row, column] > 0.5 else "black"
        if count:
            axes.text(column, row, f"{count:.0f}", ha="center", va="center", color=shade, fontsize=8)
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    return file.getvalue()


def token_sums(logits: torch.Tensor, labels: torch.Tensor, bytes_per_token: np.ndarray) -> dict[str, torch.Tensor]:
    """Sum loss, targets, correct first guesses and the UTF-8 bytes of the targets: four scalars ().

    Args:
        logits: (B, S, V), of any floating type.
        labels: (B, S) int64; IGNORED is no target.
        bytes_per_token: int64 (V,).
    """
    import torch

    from jobs.tasks.cross_entropy import cross_entropy_sum

    counted = labels != IGNORED
    targets = labels[counted]
    return {
        "loss": cross_entropy_sum(logits, labels),
        "targets": counted.sum(),
        "correct": (logits[counted].argmax(-1) == targets).sum(),
        "bytes": torch.from_numpy(bytes_per_token).to(targets.device)[targets].sum(),
    }


def of_tokens(sums: Mapping[str, float]) -> dict[str, float]:
    """Return loss (nats per token), perplexity, accuracy, and bits_per_byte = loss_sum / (ln 2 · bytes) of sums."""
    loss = sums["loss"] / max(sums["targets"], 1)
    summary = {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "accuracy": sums["correct"] / max(sums["targets"], 1),
    }
    if sums["bytes"]:
        summary["bits_per_byte"] = sums["loss"] / math.log(2) / sums["bytes"]
    return summary
