"""How well scores tell classes apart, and how far they can be believed: AUC, the ROC curve, the reliability diagram."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jobs.tasks.pictures import png
from jobs.tasks.scores import BINS

CURVES = 10
"""With more classes than this, each against the rest, only so many curves are drawn."""


def auc(scores: np.ndarray, truths: np.ndarray) -> float | None:
    """Return the area under the ROC curve, exact, ties counted half: of several classes the mean of each against the
    rest, over those that occur.

    Args:
        scores: (N, C) probabilities.
        truths: (N,) numbers of the true classes.

    Returns:
        None where all rows are of one class: there is nothing to tell apart.
    """
    from sklearn.metrics import roc_auc_score

    if len(np.unique(truths)) < 2:
        return None
    areas = [roc_auc_score(truths == at, scores[:, at]) for at in _told(scores, truths)]
    return float(np.mean(areas))


def roc_picture(scores: np.ndarray, truths: np.ndarray, labels: Sequence[str]) -> bytes:
    """Draw the ROC curve of each class against the rest, (N, C) and (N,): a PNG."""
    from matplotlib.figure import Figure
    from sklearn.metrics import roc_curve

    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="false positives", ylabel="true positives", aspect="equal")
    axes.plot([0, 1], [0, 1], color="grey", linewidth=1)
    for at in _told(scores, truths)[:CURVES]:
        false, true, _ = roc_curve(truths == at, scores[:, at])
        axes.plot(false, true, label=labels[at])
    axes.legend(loc="lower right")
    return png(figure)


def reliability_picture(bins: np.ndarray) -> bytes:
    """Draw how often guesses are right against how confident they are, of bins (3, BINS) as scores.py adds them up."""
    from matplotlib.figure import Figure

    guesses, confidence, right = bins
    there = guesses > 0
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="confidence", ylabel="share that is right", xlim=(0, 1), ylim=(0, 1))
    axes.plot([0, 1], [0, 1], color="grey", linewidth=1)
    axes.bar((np.arange(BINS)[there] + 0.5) / BINS, (right / np.maximum(guesses, 1))[there], 0.9 / BINS, alpha=0.5)
    axes.scatter((confidence / np.maximum(guesses, 1))[there], (right / np.maximum(guesses, 1))[there], s=15)
    return png(figure)


def _told(scores: np.ndarray, truths: np.ndarray) -> list[int]:
    """Return the classes whose curves are drawn: of two, the second; else those that occur."""
    return [1] if scores.shape[1] == 2 else np.unique(truths).astype(int).tolist()
