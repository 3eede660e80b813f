"""Objects as centre points on a grid: what is to be learned of their boxes, the loss, and boxes from what was learned.

The grid has a cell for 4 by 4 pixels. Boxes are corners x1, y1, x2, y2 as shares of the image's sides, 0 to 1.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from jobs.tasks.boxes import areas, generalized_iou, suppressed

SPREAD = 0.09
"""Deviation of the bell around a centre, as a share of the object's sides: 0.54 / 6, as in TTFNet (Liu et al. 2020)."""
SIDES_WEIGHT = 5.0
"""Of the loss of the boxes beside that of the centres, as in TTFNet."""


def loss(
    logits: torch.Tensor, distances: torch.Tensor, boxes: torch.Tensor, labels: torch.Tensor, crowd: torch.Tensor
) -> torch.Tensor:
    """Return the loss of each image, (B,) fp32: of the centres, by their number, and five times that of the boxes.

    Centres: the focal loss of CenterNet, equation 1. Boxes: 1 - generalised IoU in the cells around each centre,
    weighted by the bell. Where a crowd is, nothing is learned of centres.

    Args:
        logits: (B, C, h, w). distances: (B, 4, h, w).
        boxes: (B, M, 4), and labels (B, M) int64, of M objects or fewer: -1 is none.
        crowd: (B, M) bool.
    """
    counted = (labels >= 0) & ~crowd
    bells = _bells(boxes, logits.shape[-2:]) * counted[:, :, None, None]
    count = counted.sum(1).clamp(min=1)
    hidden = _covered(boxes, logits.shape[-2:]) & (crowd & (labels >= 0))[:, :, None, None]
    heat = _by_category(bells, labels, logits.shape[1])
    of_centres = _focal(logits, heat) * ~hidden.any(1)[:, None]
    return of_centres.sum((1, 2, 3)) / count + SIDES_WEIGHT * _of_boxes(distances, boxes, bells)


def found(logits: torch.Tensor, distances: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the best `most` boxes of each image, (B, K, 4), their scores (B, K) fp32 and labels (B, K) int64.

    A centre is a cell that is likelier than those around it; of boxes of one label that overlap by more than 0.6 the
    best is kept, the others have the score 0.
    """
    scores = logits.sigmoid()
    peaks = scores * (functional.max_pool2d(scores, 3, 1, 1) == scores)
    batch, categories, height, width = scores.shape
    best = peaks.flatten(1).topk(min(most, categories * height * width))
    labels, cells = best.indices // (height * width), best.indices % (height * width)
    boxes = _boxes(distances).flatten(2).gather(2, cells[:, None].expand(-1, 4, -1)).transpose(1, 2).clamp(0, 1)
    kept = torch.stack([suppressed(boxes[i], best.values[i], labels[i]) for i in range(batch)])
    order = kept.argsort(1, descending=True)
    boxes = boxes.gather(1, order[:, :, None].expand(-1, -1, 4))
    return boxes, kept.gather(1, order), labels.gather(1, order)


def _boxes(distances: torch.Tensor) -> torch.Tensor:
    """Turn distances (B, 4, h, w) in cells into corners (B, 4, h, w) as shares of the sides."""
    height, width = distances.shape[-2:]
    rows = torch.arange(height, device=distances.device)[:, None] + 0.5
    columns = torch.arange(width, device=distances.device)[None, :] + 0.5
    left, top, right, bottom = distances.unbind(1)
    corners = [(columns - left) / width, (rows - top) / height, (columns + right) / width, (rows + bottom) / height]
    return torch.stack(corners, 1)


def _bells(boxes: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """Return for each object (B, M) a bell (h, w) that is 1 in the cell of its centre."""
    sides, middles = boxes[..., 2:] - boxes[..., :2], (boxes[..., :2] + boxes[..., 2:]) / 2
    along = []
    for axis, cells in ((1, size[0]), (0, size[1])):
        at = torch.arange(cells, device=boxes.device)
        centre = (middles[..., axis] * cells).floor().clamp(0, cells - 1)
        deviation = (SPREAD * sides[..., axis] * cells).clamp(min=0.3)
        along.append((-((at - centre[..., None]) ** 2) / (2 * deviation[..., None] ** 2)).exp())
    bells = along[0][..., :, None] * along[1][..., None, :]
    return torch.where(bells < 0.01, 0, bells)


def _covered(boxes: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """Return which cells' middles each object covers, bool (B, M, h, w)."""
    rows = (torch.arange(size[0], device=boxes.device) + 0.5) / size[0]
    columns = (torch.arange(size[1], device=boxes.device) + 0.5) / size[1]
    down = (rows >= boxes[..., 1, None]) & (rows < boxes[..., 3, None])
    across = (columns >= boxes[..., 0, None]) & (columns < boxes[..., 2, None])
    return down[..., :, None] & across[..., None, :]


def _by_category(bells: torch.Tensor, labels: torch.Tensor, categories: int) -> torch.Tensor:
    """Return the highest bell of each category, (B, C, h, w)."""
    heat = torch.zeros(len(bells), categories, *bells.shape[-2:], device=bells.device)
    at = labels.clamp(0, categories - 1)  # -1 is none, and beyond is a crowd of an unknown category: neither has a bell
    index = at[:, :, None, None].expand_as(bells)
    return heat.scatter_reduce(1, index, bells, "amax")


def _focal(logits: torch.Tensor, heat: torch.Tensor) -> torch.Tensor:
    """Return the focal loss of each cell and category (B, C, h, w), less the farther a cell is down a bell."""
    chance = logits.sigmoid()
    there = -functional.logsigmoid(logits) * (1 - chance) ** 2
    elsewhere = -functional.logsigmoid(-logits) * chance**2 * (1 - heat) ** 4
    return torch.where(heat >= 1, there, elsewhere)


def _of_boxes(distances: torch.Tensor, boxes: torch.Tensor, bells: torch.Tensor) -> torch.Tensor:
    """Return the loss of the boxes of each image (B,), the mean over its objects; a cell is the smallest one's."""
    sizes = torch.where(bells > 0, areas(boxes)[:, :, None, None], torch.inf)
    owned = bells * (sizes <= sizes.amin(1, keepdim=True))
    guessed = _boxes(distances).permute(0, 2, 3, 1)[:, None]
    wrong = 1 - generalized_iou(guessed, boxes[:, :, None, None, :])
    weights = owned.sum((2, 3))
    each = (wrong * owned).sum((2, 3)) / weights.clamp(min=1e-6)
    return (each * (weights > 0)).sum(1) / (weights > 0).sum(1).clamp(min=1)
