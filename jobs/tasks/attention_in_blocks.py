"""Causal attention of one document, a block of queries at a time: with dropout, and for values of any width, on a CPU.

torch's own makes all scores of a document at once where weights are dropped, and keeps them for the backward pass. Here
the backward pass makes a block's scores, and what was dropped of them, a second time from a seed (as FlashAttention
does: Dao et al. 2022, arXiv:2205.14135, algorithm 4); a block's are all that there is at any time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

BLOCK = 128
"""Queries whose scores are there at once."""


class Dropped:
    """Draws which of a document's weights are dropped, in the same order forward and backward."""

    def __init__(self, share: float, seed: torch.Tensor | None) -> None:
        """Begin; `seed` (1,) int64, where any are dropped."""
        self._share = share
        self._generator = torch.Generator()
        if seed is not None:
            self._generator.manual_seed(int(seed))

    def kept(self, weights: torch.Tensor) -> torch.Tensor | None:
        """Return what a block's weights (1, H, N, M) are multiplied by: 0, or 1 / (1 - share); None: by nothing."""
        if not self._share:
            return None
        kept = 1 - self._share
        return torch.empty_like(weights).bernoulli_(kept, generator=self._generator).div_(kept or 1.0)


def forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, dropped: Dropped
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what tokens make of those before them, and the logarithms of their weights' sums: (1, H, L, V), (1, H, L).

    Args:
        query, key: (1, H, L, D).
        value: (1, H, L, V).
        scale: what products are multiplied by; None: 1 / √D.
        dropped: draws what is dropped.
    """
    made, sums = [], []
    for at, before in _blocks(query.shape[-2]):
        scores = _scores(query[..., at, :], key[..., before, :], scale)
        logarithms = scores.logsumexp(-1)
        weights = scores.sub_(logarithms[..., None]).exp_()
        kept = dropped.kept(weights)
        made.append((weights if kept is None else weights * kept) @ _exact(value[..., before, :]))
        sums.append(logarithms)
    return torch.cat(made, dim=-2).to(value.dtype), torch.cat(sums, dim=-1)


def backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    made: torch.Tensor,
    sums: torch.Tensor,
    *,
    scale: float | None,
    dropped: Dropped,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key and value from that of what was made of them.

    Args:
        gradient, made: (1, H, L, V).
        query, key: (1, H, L, D).
        value: (1, H, L, V).
        sums: what `forward` returned besides, (1, H, L).
        scale: what products are multiplied by; None: 1 / √D.
        dropped: draws what it drew then.
    """
    factor = _factor(query, scale)
    of_query, of_key, of_value = (torch.zeros_like(_exact(tensor)) for tensor in (query, key, value))
    for at, before in _blocks(query.shape[-2]):
        weights = _scores(query[..., at, :], key[..., before, :], scale).sub_(sums[..., at, None]).exp_()
        kept = dropped.kept(weights)
        given = _exact(gradient[..., at, :])
        of_value[..., before, :] += (weights if kept is None else weights * kept).mT @ given
        of_weights = given @ _exact(value[..., before, :]).mT
        if kept is not None:
            of_weights *= kept
        of_weights -= (given * _exact(made[..., at, :])).sum(-1, keepdim=True)
        of_scores = of_weights.mul_(weights).mul_(factor)
        of_query[..., at, :] = of_scores @ _exact(key[..., before, :])
        of_key[..., before, :] += of_scores.mT @ _exact(query[..., at, :])
    return of_query.to(query.dtype), of_key.to(key.dtype), of_value.to(value.dtype)


def _blocks(length: int) -> Iterator[tuple[slice, slice]]:
    """Yield the places of each block's queries, and of the keys that any of them sees."""
    for start in range(0, length, BLOCK):
        end = min(start + BLOCK, length)
        yield slice(start, end), slice(0, end)


def _scores(query: torch.Tensor, key: torch.Tensor, scale: float | None) -> torch.Tensor:
    """Return the scores (1, H, N, M) of queries (1, H, N, D), of which the last sees all keys (1, H, M, D)."""
    scores = _exact(query) @ _exact(key).mT
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
    return scores.mul_(_factor(query, scale)).masked_fill_(later.triu(key.shape[-2] - query.shape[-2] + 1), -math.inf)


def _factor(query: torch.Tensor, scale: float | None) -> float:
    return query.shape[-1] ** -0.5 if scale is None else scale


def _exact(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of any shape in fp32, or fp64 if it is in that."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
