"""Objects of an image as raw examples hold them, checked; and boxes against boxes.

A list of mappings with `bbox` [x, y, width, height] in pixels and `category`, as COCO has them; or one mapping of
lists, `{"bbox": […], "category": […]}`, as data sets of the hub have them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jobs.tasks import TaskError
from jobs.tasks.messages import is_blank, text_of

if TYPE_CHECKING:
    import torch

SLACK = 1.0
"""A box may lie outside its image by so many pixels, as rounding makes of many; it is clipped."""
READ = {"bbox", "category", "iscrowd", "area", "where"}
"""What is read of an object; its area is that of its box."""


@dataclass(frozen=True)
class Object:
    """One object of an image."""

    box: tuple[float, float, float, float]
    """x, y, width, height in pixels."""
    category: str
    crowd: bool = False
    """A region of many that nobody counted: nothing is learned there, and no guess there is wrong."""


def objects_of(value: Any, column: str) -> list[Object]:
    """Return the objects of an image.

    Raises:
        TaskError: they have another form, or a box that cannot be.
    """
    return [_object(entry, f"{column}[{number}]") for number, entry in enumerate(entries_of(value, column))]


def entries_of(value: Any, column: str) -> Sequence[Mapping[str, Any]]:
    """Return the objects as mappings, one each, whatever form they have. Raises TaskError."""
    if isinstance(value, Mapping):
        return _entries_of_lists(value, column)
    if not isinstance(value, list | tuple) or not all(isinstance(entry, Mapping) for entry in value):
        raise TaskError(f"column {column!r} holds {value!r:.60}, no list of objects, each with bbox and category")
    return value


def _entries_of_lists(value: Mapping[str, Any], column: str) -> list[dict[str, Any]]:
    """Return a mapping of lists as one mapping an object; what is no list and not read stands in each.

    Raises:
        TaskError: what is read is no list, or the lists have several lengths: a box would be lost, or another's.
    """
    lists = {key: _listed(each) for key, each in value.items() if _is_list(each)}
    for key in sorted(READ & value.keys() | {"bbox", "category"}):
        if key not in lists and (value.get(key) is not None or key in ("bbox", "category")):
            raise TaskError(
                f"{column}.{key} is {value.get(key)!r:.60}, no list: a mapping of objects has lists, with an entry for "
                "each object, and empty ones where there is none"
            )
    if len({len(each) for each in lists.values()}) > 1:
        lengths = {key: len(each) for key, each in lists.items()}
        raise TaskError(f"column {column!r} holds lists of several lengths, {lengths}: one entry for each object")
    others = {key: each for key, each in value.items() if key not in lists and each is not None}
    return [{**others, **dict(zip(lists, entry, strict=True))} for entry in zip(*lists.values(), strict=True)]


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) or getattr(value, "ndim", 0) > 0


def _listed(value: Any) -> list[Any]:
    return list(value.tolist() if hasattr(value, "tolist") else value)


def _object(entry: Mapping[str, Any], at: str) -> Object:
    at = str(entry.get("where", at))
    category: Any = entry.get("category")
    box: Any = entry.get("bbox")
    if isinstance(category, int) and not isinstance(category, bool) and category >= 0:
        category = str(category)
    if not isinstance(category, str) or is_blank(category):
        raise TaskError(f"{at}: category is {category!r:.40}, no name and no whole number of 0 or more")
    text_of(category, f"{at}: category")
    numbers = _listed(box) if _is_list(box) else []
    if len(numbers) != 4 or not all(_is_finite(each) for each in numbers):
        raise TaskError(f"{at}: bbox is {box!r:.60}, not four numbers [x, y, width, height]")
    x, y, width, height = map(float, numbers)
    if width <= 0 or height <= 0:
        raise TaskError(f"{at}: the box {numbers} has no area: width and height are more than 0")
    if max(x, y, width, height) <= 1:
        raise TaskError(
            f"{at}: the box {numbers} lies within the first pixel, as boxes do that are shares of the image's sides: "
            "a box is [x, y, width, height] in pixels"
        )
    return Object((x, y, width, height), category, _crowd(entry.get("iscrowd"), at))


def _crowd(value: Any, at: str) -> bool:
    if value not in (None, 0, 1, False, True):
        raise TaskError(f"{at}: iscrowd is {value!r:.40}, neither 0 nor 1")
    return bool(value)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def inside(found: Object, width: int, height: int, at: str) -> tuple[float, float, float, float]:
    """Return an object's box as corners x1, y1, x2, y2 within an image of that size.

    Raises:
        TaskError: it lies outside by more than rounding: in other units, or of another image.
    """
    x, y, w, h = found.box
    if x < -SLACK or y < -SLACK or x + w > width + SLACK or y + h > height + SLACK:
        corners_fit = 0 <= x < w <= width and 0 <= y < h <= height
        hint = ", and as two corners, x1, y1, x2, y2, this one would lie inside" if corners_fit else ""
        raise TaskError(
            f"{at}: the box {[*found.box]} lies outside the image of {width} x {height}; a box is [x, y, width, "
            f"height] in pixels{hint}"
        )
    corners = max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))
    if corners[0] >= corners[2] or corners[1] >= corners[3]:
        raise TaskError(f"{at}: nothing of the box {[*found.box]} lies inside the image of {width} x {height}")
    return corners


def areas(boxes: torch.Tensor) -> torch.Tensor:
    """Return the areas (B, …) of boxes (B, …, 4) of corners."""
    return (boxes[..., 2] - boxes[..., 0]).clamp(min=0) * (boxes[..., 3] - boxes[..., 1]).clamp(min=0)


def generalized_iou(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the generalised intersection over union (…) of pairs of boxes (…, 4) of corners, -1 to 1.

    Rezatofighi et al. 2019 (arXiv:1902.09630), algorithm 1.
    """
    import torch

    low, high = torch.maximum(one[..., :2], other[..., :2]), torch.minimum(one[..., 2:], other[..., 2:])
    common = (high - low).clamp(min=0).prod(-1)
    union = areas(one) + areas(other) - common
    around_low, around_high = torch.minimum(one[..., :2], other[..., :2]), torch.maximum(one[..., 2:], other[..., 2:])
    around = (around_high - around_low).clamp(min=0).prod(-1)
    return common / union.clamp(min=1e-9) - (around - union) / around.clamp(min=1e-9)


def iou_to_all(box: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Return the intersection over union (N,) of a box (4,) with boxes (N, 4), of corners."""
    import torch

    low, high = torch.maximum(box[:2], boxes[:, :2]), torch.minimum(box[2:], boxes[:, 2:])
    common = (high - low).clamp(min=0).prod(-1)
    return common / (areas(box) + areas(boxes) - common).clamp(min=1e-9)


def suppressed(boxes: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor, most: float = 0.6) -> torch.Tensor:
    """Return scores (N,) with 0 for boxes that overlap a better one of the same label by more than `most`.

    Args:
        boxes: (N, 4) corners; scores, fp32, and labels, int64: (N,).
    """
    import torch

    kept = scores.clone()
    order = scores.argsort(descending=True).tolist()
    for rank, index in enumerate(order):
        if kept[index] <= 0:
            continue
        later = torch.tensor(order[rank + 1 :], dtype=torch.long, device=scores.device)
        if len(later):
            overlap = iou_to_all(boxes[index], boxes[later])
            kept[later[(overlap > most) & (labels[later] == labels[index])]] = 0
    return kept


def in_pixels(boxes: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """Turn boxes (B, K, 4), corners as shares, into x, y, width, height in pixels of images of size (B, 2)."""
    import torch

    scale = size.flip(1)[:, None].float()
    low, high = boxes[..., :2] * scale, boxes[..., 2:] * scale
    return torch.cat([low, high - low], -1)


def mirrored(pixels: torch.Tensor, boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mirror some images (B, C, H, W), with their boxes (B, M, 4)."""
    import torch

    chosen = torch.rand(len(pixels), device=pixels.device) < 0.5
    other = torch.stack([1 - boxes[..., 2], boxes[..., 1], 1 - boxes[..., 0], boxes[..., 3]], -1)
    pixels = torch.where(chosen[:, None, None, None], pixels.flip(3), pixels)
    return pixels, torch.where(chosen[:, None, None], other, boxes)
