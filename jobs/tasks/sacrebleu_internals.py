"""chrF of a corpus that is measured in parts, which sacrebleu has no public way for.

`CHRF.corpus_score` tells only the score, and scores of parts do not add up; the counts behind it do. Two private
methods of sacrebleu 2.6 make and read them. To go when its scores carry their counts, as `BLEUScore` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cluster.internals import Internal

ENTRIES = (
    Internal(
        "sacrebleu.metrics.CHRF._extract_corpus_statistics, _compute_score_from_stats",
        "chrF of held-out rows that are measured in parts, on several ranks; the public scores carry no counts",
        "chrF is not measured, or is another figure",
        "sacrebleu's CHRFScore carries its counts, as BLEUScore does",
    ),
)

CHRF_COUNTS = 18
"""Of each of six orders of characters: those of the hypotheses, of the references, and those in both."""


def chrf_counts(hypotheses: Sequence[str], references: Sequence[str]) -> list[int]:
    """Return the counts of `CHRF_COUNTS`, added up over N pairs."""
    each: list[list[int]] = _metric()._extract_corpus_statistics(list(hypotheses), [list(references)])
    return [sum(column) for column in zip(*each, strict=True)]


def chrf_of(counts: Sequence[float]) -> float:
    """Return chrF2, 0 to 100, of such counts."""
    return float(_metric()._compute_score_from_stats(list(counts)).score)


def _metric() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()
