"""BLEU and chrF out of counts that add up over batches and ranks; sacrebleu makes the counts and the scores.

Its defaults hold: BLEU by the 13a tokenisation with exponential smoothing, chrF2 over six orders of characters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jobs.tasks import sacrebleu_internals, scores

if TYPE_CHECKING:
    import torch

ORDERS = 4
"""BLEU's longest n-gram."""


def counts(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, torch.Tensor]:
    """Count what both scores need of N hypotheses, each with one reference.

    Returns:
        bleu (10,): n-grams that match, of 1 to 4 words, all n-grams of the hypotheses, the words of hypotheses and of
        references; chrf (18,). Both int64.
    """
    import torch

    if not hypotheses:
        bleu, chrf = [0] * (2 * ORDERS + 2), [0] * sacrebleu_internals.CHRF_COUNTS
    else:
        found = _bleu().corpus_score(list(hypotheses), [list(references)])
        bleu = [*found.counts, *found.totals, found.sys_len, found.ref_len]
        chrf = sacrebleu_internals.chrf_counts(hypotheses, references)
    return {"bleu": torch.tensor(bleu), "chrf": torch.tensor(chrf)}


def of(sums: Mapping[str, Any]) -> dict[str, float]:
    """Return bleu and chrf, 0 to 100, of counts that were added up."""
    bleu = [int(count) for count in scores.array(sums, "bleu")]
    score = _bleu().compute_bleu(bleu[:ORDERS], bleu[ORDERS : 2 * ORDERS], *bleu[2 * ORDERS :], smooth_method="exp")
    return {"bleu": float(score.score), "chrf": sacrebleu_internals.chrf_of(scores.array(sums, "chrf").tolist())}


def _bleu() -> Any:
    from sacrebleu.metrics import BLEU

    return BLEU()
