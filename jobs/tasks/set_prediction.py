"""Objects as a set of guesses, in the manner of DETR: guesses matched with objects, the loss, and the best guesses.

Carion et al. 2020 (arXiv:2005.12872). Unlike there, the loss is each image's own, so that it does not depend on which
images share a batch. Boxes of objects are corners as shares of the image's sides; of guesses, middles and sizes.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from jobs.tasks.boxes import generalized_iou, suppressed

L1, OVERLAP, NOTHING = 5.0, 2.0, 0.1
"""Weights: of the distance of boxes, of their generalised IoU, and of guesses that are nothing (section A.4)."""


def loss(
    logits: torch.Tensor, guessed: torch.Tensor, boxes: torch.Tensor, labels: torch.Tensor, crowd: torch.Tensor
) -> torch.Tensor:
    """Return the loss of each image, (B,) fp32.

    Args:
        logits: (B, Q, C + 1), the last of nothing. guessed: (B, Q, 4).
        boxes: (B, M, 4), and labels (B, M) int64, of M objects or fewer: -1 is none.
        crowd: (B, M) bool: a guess whose middle lies in one may be nothing or not.
    """
    return torch.stack([_of_image(*image) for image in zip(logits, guessed, boxes, labels, crowd, strict=True)])


def found(logits: torch.Tensor, guessed: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the best `most` boxes of each image, (B, K, 4), their scores (B, K) fp32 and labels (B, K) int64."""
    best = logits.softmax(-1)[..., :-1].max(-1)
    boxes = _corners(guessed).clamp(0, 1)
    kept = torch.stack([suppressed(boxes[i], best.values[i], best.indices[i]) for i in range(len(boxes))])
    scores, order = kept.topk(min(most, kept.shape[1]))
    return boxes.gather(1, order[:, :, None].expand(-1, -1, 4)), scores, best.indices.gather(1, order)


def _of_image(
    logits: torch.Tensor, guessed: torch.Tensor, boxes: torch.Tensor, labels: torch.Tensor, crowd: torch.Tensor
) -> torch.Tensor:
    counted = (labels >= 0) & ~crowd
    truths, classes, corners = boxes[counted], labels[counted], _corners(guessed)
    rows, columns = _matched(logits, guessed, corners, truths, classes)
    wanted = torch.full((len(logits),), logits.shape[-1] - 1, device=logits.device)
    wanted[rows] = classes[columns]
    weights = torch.full((len(logits),), NOTHING, device=logits.device)
    weights[_inside(guessed, boxes[crowd & (labels >= 0)])] = 0
    weights[rows] = 1
    of_classes = (functional.cross_entropy(logits, wanted, reduction="none") * weights).sum() / weights.sum().clamp(
        1e-6
    )
    apart = (guessed[rows] - _middles(truths[columns])).abs().sum()
    unlike = (1 - generalized_iou(corners[rows], truths[columns])).sum()
    return of_classes + (L1 * apart + OVERLAP * unlike) / max(len(truths), 1)


@torch.no_grad()
def _matched(
    logits: torch.Tensor, guessed: torch.Tensor, corners: torch.Tensor, truths: torch.Tensor, classes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which guesses and which objects belong together, int64 (m,) each, m the lesser number."""
    from scipy.optimize import linear_sum_assignment

    apart = torch.cdist(guessed.float(), _middles(truths), p=1)
    alike = generalized_iou(corners[:, None].float(), truths[None])
    cost = L1 * apart - OVERLAP * alike - logits.float().softmax(-1)[:, classes]
    rows, columns = linear_sum_assignment(cost.cpu().numpy())
    return tuple(torch.as_tensor(each, device=logits.device) for each in (rows, columns))  # type: ignore[return-value]


def _inside(guessed: torch.Tensor, crowds: torch.Tensor) -> torch.Tensor:
    """Return whose middles lie in a crowd, bool (Q,), of guesses (Q, 4) and crowds (m, 4)."""
    middles = guessed[:, None, :2]
    inside: torch.Tensor = ((middles >= crowds[:, :2]) & (middles <= crowds[:, 2:])).all(-1).any(1)
    return inside


def _corners(boxes: torch.Tensor) -> torch.Tensor:
    return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)


def _middles(boxes: torch.Tensor) -> torch.Tensor:
    return torch.cat([(boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]], -1)
