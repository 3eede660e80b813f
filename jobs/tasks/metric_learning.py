"""Losses of metric learning: images of one identity come to lie close together, others far apart."""

from __future__ import annotations

import math

import torch
from torch.nn import functional


def arcface(
    vectors: torch.Tensor, centres: torch.Tensor, labels: torch.Tensor, margin: float, scale: float
) -> torch.Tensor:
    """Return the additive angular margin loss of each image, (B,) fp32 nats; 0 where its label is negative.

    Deng et al. 2019 (arXiv:1801.07698), equation 3. Where the angle and the margin together are more than a half-turn,
    the cosine goes on falling as a straight line, as in the authors' own code.

    Args:
        vectors: (B, E), of length 1.
        centres: (identities, E), of length 1.
        labels: (B,) int64; -1 for an identity that has no centre.
        margin: added to the angle between a vector and its own centre, in radians.
        scale: what cosines are multiplied with.
    """
    known = labels >= 0
    cosines = vectors @ centres.T
    own = cosines.gather(1, labels.clamp(min=0)[:, None])[:, 0].clamp(-1 + 1e-7, 1 - 1e-7)
    harder = torch.where(own > -math.cos(margin), (own.acos() + margin).cos(), own - margin * math.sin(margin))
    logits = scale * cosines.scatter(1, labels.clamp(min=0)[:, None], harder[:, None])
    return functional.cross_entropy(logits, labels.clamp(min=0), reduction="none") * known


def triplets(
    vectors: torch.Tensor, identities: torch.Tensor, margin: float, start: int = 0, end: int | None = None
) -> torch.Tensor:
    """Return the batch-hard triplet loss of each image among those given, (B,); 0 where its identity has no other.

    Hermans et al. 2017 (arXiv:1703.07737), equation 5: the margin and the distance to the farthest image of the same
    identity, less that to the nearest of another one.

    Args:
        vectors: (B, E), of length 1.
        identities: (B,) int64, equal for images of one identity.
        start, end: those of which the loss is asked for, where these are not all.
    """
    mine = slice(start, end)
    distances = (2 - 2 * vectors[mine] @ vectors.T).clamp(min=1e-9).sqrt()
    same = identities[mine, None] == identities[None, :]
    rows = torch.arange(len(same), device=same.device)
    others = same.clone()
    others[rows, start + rows] = False
    farthest = distances.masked_fill(~others, 0).amax(1)
    nearest = distances.masked_fill(same, 2).amin(1)  # 2: no two vectors of length 1 are farther apart
    return (margin + farthest - nearest).clamp(min=0) * others.any(1)


def to_centres(vectors: torch.Tensor, centres: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return how alike each image is to its own centre, -2 where it has none, and to the nearest other one: (B, 2).

    Args:
        vectors: (B, E); centres: (identities, E); both of length 1.
        labels: (B,) int64; -1 for an identity that has no centre.
    """
    alike, own = vectors @ centres.T, labels.clamp(min=0)[:, None]
    known = (labels >= 0)[:, None]
    to_own = torch.where(known, alike.gather(1, own), -2)
    others = torch.where(known, alike.scatter(1, own, -2), alike)
    return torch.cat([to_own, others.amax(1, keepdim=True)], 1)
