"""How well vectors tell identities apart: pairs of all held-out rows, counted by their similarity.

Similarities are cosines, rounded to one of 65,536 steps between -1 and 1; of the counts, everything here is exact.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

STEPS = 1 << 16
BLOCK = 1024
"""Rows whose similarities to all others are in memory at a time."""


@dataclass(frozen=True)
class Pairs:
    """Pairs by similarity, int64 (STEPS,) each, from the least similar to the most."""

    same: np.ndarray
    """Pairs of one identity."""
    different: np.ndarray

    @classmethod
    def of(cls, vectors: np.ndarray, identities: np.ndarray) -> Pairs:
        """Count the N (N - 1) / 2 pairs of vectors (N, E), of length 1, with identities int64 (N,)."""
        counts = np.zeros((2, STEPS), dtype=np.int64)
        for start in range(0, len(vectors), BLOCK):
            steps = _steps(vectors[start : start + BLOCK] @ vectors[start:].T)
            same = identities[start : start + BLOCK, None] == identities[None, start:]
            later = np.triu(np.ones(steps.shape, dtype=bool), 1)
            for row, chosen in enumerate((same & later, ~same & later)):
                counts[row] += np.bincount(steps[chosen], minlength=STEPS)
        return cls(*counts)

    @classmethod
    def counted(cls, same: np.ndarray, different: np.ndarray) -> Pairs:
        """Count similarities, fp32 (N,) and (M,), of what belongs together and of what does not."""
        return cls(*(np.bincount(_steps(each), minlength=STEPS) for each in (same, different)))

    def auc(self) -> float:
        """Return the area under the ROC: how often a pair of one identity is more alike than one of two; nan: no pairs.

        Pairs that are equally alike count half.
        """
        total = self.same.sum() * self.different.sum()
        below = np.cumsum(self.different) - self.different / 2
        return float((self.same * below).sum() / total) if total else float("nan")

    def rates(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the shares of pairs, same and different, that are at least so alike as each step: float64 (STEPS,)."""
        shares = (each[::-1].cumsum()[::-1] / max(each.sum(), 1) for each in (self.same, self.different))
        true, false = shares
        return true, false

    def threshold(self) -> float:
        """Return the similarity from which on pairs are best taken for one identity; the middle of those as good.

        Best is the mean of how many pairs of one identity and how many of two are told right.
        """
        true, false = self.rates()
        right = true - false
        best = np.flatnonzero(right >= right.max() - 1e-12)
        return float(2 * best[len(best) // 2] / (STEPS - 1) - 1)

    def accuracy(self, threshold: float) -> float:
        """Return the mean of the shares of pairs, of one identity and of two, that a threshold tells right."""
        true, false = self.rates()
        step = int(_steps(np.array(threshold)))
        return float((true[step] + 1 - false[step]) / 2)


def _steps(similarities: np.ndarray) -> np.ndarray:
    return np.rint((np.clip(similarities, -1, 1) + 1) / 2 * (STEPS - 1)).astype(np.int64)


def accuracy(vectors: np.ndarray, identities: np.ndarray) -> float:
    """Return the verification accuracy by cross-validation over two halves of the rows.

    The threshold is chosen on the pairs of one half, and tried on those of the other; no row is in both. nan where a
    half has no pair of one identity, or none of two.

    Args:
        vectors: (N, E), of length 1. identities: int64 (N,).
    """
    halves = [Pairs.of(vectors[start::2], identities[start::2]) for start in (0, 1)]
    if any(not (half.same.any() and half.different.any()) for half in halves):
        return float("nan")
    return (halves[1].accuracy(halves[0].threshold()) + halves[0].accuracy(halves[1].threshold())) / 2


def recall_at_1(vectors: np.ndarray, identities: np.ndarray) -> float:
    """Return which share of vectors (N, E) has one of its own identity nearest, of those that have another.

    nan where none has.
    """
    right = asked = 0
    _, group, sizes = np.unique(identities, return_inverse=True, return_counts=True)
    for start in range(0, len(vectors), BLOCK):
        alike = vectors[start : start + BLOCK] @ vectors.T
        rows = np.arange(len(alike))
        alike[rows, start + rows] = -np.inf
        has_other = sizes[group[start : start + BLOCK]] > 1
        right += int((group[alike.argmax(1)] == group[start : start + BLOCK])[has_other].sum())
        asked += int(has_other.sum())
    return right / asked if asked else float("nan")


def summary(sums: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of rows; what these have no pairs for is left out.

    Args:
        sums: embedding (N, E) fp32, identity (N,) int64 and to_centres (N, 2) fp32; the sums loss, known, targets and
            margin, as `ImageEmbedding.measure` returns them.

    Returns:
        loss: arcface's mean over the `known` rows; where these are none, that of triplets over all rows.
        auc, verification_accuracy, recall_at_1, threshold; identity_threshold, from which similarity to a centre on an
        image is best taken for one of its identity.
    """
    vectors, identities = sums["embedding"], sums["identity"]
    pairs = Pairs.of(vectors, identities)
    of_pairs = {
        "auc": pairs.auc(),
        "verification_accuracy": accuracy(vectors, identities),
        "recall_at_1": recall_at_1(vectors, identities),
        "threshold": pairs.threshold() if pairs.same.any() and pairs.different.any() else float("nan"),
    }
    own, other = sums["to_centres"].T
    if sums["known"]:
        of_pairs["identity_threshold"] = Pairs.counted(own[own >= -1], other).threshold()
    margin = sums["margin"] / max(sums["targets"], 1)
    loss = sums["loss"] / sums["known"] if sums["known"] else _triplets(vectors, identities, margin)
    return {"loss": loss, **{name: value for name, value in of_pairs.items() if not np.isnan(value)}}


def _triplets(vectors: np.ndarray, identities: np.ndarray, margin: float) -> float:
    """Return the mean loss of triplets over all rows: vectors (N, E) fp32, identities (N,) int64."""
    import torch

    from jobs.tasks import metric_learning

    rows = torch.from_numpy(vectors), torch.from_numpy(identities), margin
    blocks = (metric_learning.triplets(*rows, start, start + BLOCK) for start in range(0, len(vectors), BLOCK))
    return float(sum(block.double().sum() for block in blocks)) / max(len(vectors), 1)


def pictures(pairs: Pairs) -> dict[str, bytes]:
    """Draw the ROC, and how alike pairs are: name of a file → PNG."""
    true, false = pairs.rates()
    roc, axes = _figure(xlabel="pairs of two identities taken for one", ylabel="pairs of one identity found")
    axes.plot([*false, 0], [*true, 0])
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.5)
    axes.set_title(f"area {pairs.auc():.4f}")
    alike, axes = _figure(xlabel="similarity", ylabel="share of pairs")
    edges = np.linspace(-1, 1, 65)
    for counts, what in ((pairs.same, "one identity"), (pairs.different, "two identities")):
        bars = counts.reshape(64, -1).sum(1) / max(counts.sum(), 1)
        axes.stairs(bars, edges, fill=True, alpha=0.5, label=what)
    axes.axvline(pairs.threshold(), color="black", linewidth=0.8, label="threshold")
    axes.legend()
    return {"roc.png": _png(roc), "similarity.png": _png(alike)}


def _figure(**labels: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4), layout="constrained")
    return figure, figure.add_subplot(**labels)  # type: ignore[call-overload]


def _png(figure: Any) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    return file.getvalue()
