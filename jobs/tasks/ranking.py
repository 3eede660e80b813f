"""How well items are ranked: ranks of which ties make nothing better, hit rate and gain, softmax over few items.

HR@k is the share of users whose next item is among the first k, NDCG@k counts it as 1 / log2(1 + place) (Järvelin and
Kekäläinen 2002). Against 100 drawn items both are far higher than among all, and may put models in another order
(Krichene and Rendle 2020), so that both are measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

MISSED = 2**31 - 1
"""The rank of what cannot be ranked at all."""


def ranks(scores: torch.Tensor, wanted: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """Return how many items stand before the wanted one, (B,) int64: those of the same score, or of NaN, do.

    Args:
        scores: (B, C) fp32.
        wanted: (B,) fp32, the wanted items' own scores.
        among: (B, C) bool, which of the others it is ranked among.
    """
    return (~(scores < wanted[:, None]) & among).sum(-1)


def hits(rank: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return HR@k and NDCG@k summed over ranks (B,), counted from 0, as two scalars () fp64."""
    import torch

    hit = (rank < k).double()
    return hit.sum(), (hit / torch.log2(rank.double() + 2)).sum()


def popularity(counts: Sequence[int]) -> np.ndarray:
    """Return each item's place when all are ranked by their counts, (I,) int32: from 0, the first of equals first."""
    order = np.argsort(-np.asarray(counts, dtype=np.int64), kind="stable")
    places = np.empty(len(order), dtype=np.int32)
    places[order] = np.arange(len(order), dtype=np.int32)
    return places


def log_inclusion(counts: Sequence[int], draws: int) -> np.ndarray:
    """Return the log-probability that an item is among `draws` interactions drawn at random, (I,) float32.

    What logQ correction takes off the scores of a batch's own items (Yi et al. 2019, Sampling-Bias-Corrected Neural
    Modeling): without it, popular items would be pushed down for being met often.
    """
    shares = np.asarray(counts, dtype=np.float64) / max(1, int(np.sum(counts)))
    return np.log(np.maximum(-np.expm1(draws * np.log1p(-np.minimum(shares, 1 - 1e-12))), 1e-12)).astype(np.float32)
