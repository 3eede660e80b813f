"""How well objects are found: COCO's mean average precision by pycocotools, and a picture of what was found."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

DRAWN = 12
"""So many images are drawn."""
THUMBNAIL = 64
"""Pixels per side, at most, of the images that are kept to draw what was found in them."""
SHOWN = 0.3
"""Guesses of a lower score are not drawn."""


def precision(found: np.ndarray, truths: np.ndarray) -> dict[str, float]:
    """Return mAP, over IoU of 0.5 to 0.95, and mAP50, at 0.5; nothing where there is no object to be found.

    Args:
        found: (N, K, 6), of each guess x, y, width, height in pixels, score and category; a score of 0 is none.
        truths: (N, M, 6), of each object x, y, width, height, category and 1 for a crowd; a category of -1 is none.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    annotations = _annotations(truths)
    if not any(not each["iscrowd"] for each in annotations):
        return {}
    guesses = [
        {"image_id": image + 1, "bbox": row[:4].tolist(), "score": float(row[4]), "category_id": int(row[5])}
        for image, rows in enumerate(found)
        for row in rows[rows[:, 4] > 0]
    ]
    if not guesses:
        return {"mAP": 0.0, "mAP50": 0.0}
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO()
        known.dataset = {
            "info": {},
            "images": [{"id": image + 1} for image in range(len(truths))],
            "annotations": annotations,
            "categories": [{"id": number} for number in sorted({each["category_id"] for each in annotations})],
        }
        known.createIndex()
        evaluation = COCOeval(known, known.loadRes(guesses), "bbox")
        evaluation.params.maxDets = [found.shape[1]]  # all that were kept; COCO's own is 100, as is the task's
        evaluation.evaluate()
        evaluation.accumulate()
    return _means(evaluation.eval["precision"][:, :, :, 0, -1])


def _means(precisions: np.ndarray) -> dict[str, float]:
    """Return mAP and mAP50 of precisions (10 overlaps from 0.5 on, recalls, categories); -1: nothing to be found."""
    each, at_half = (part[part > -1] for part in (precisions, precisions[0]))
    return {"mAP": float(each.mean()), "mAP50": float(at_half.mean())}


def _annotations(truths: np.ndarray) -> list[dict[str, Any]]:
    rows = [(image + 1, row) for image, rows in enumerate(truths) for row in rows[rows[:, 4] >= 0]]
    return [
        {
            "id": number,
            "image_id": image,
            "bbox": row[:4].tolist(),
            "area": float(row[2] * row[3]),
            "category_id": int(row[4]),
            "iscrowd": int(row[5]),
        }
        for number, (image, row) in enumerate(rows, 1)
    ]


def thumbnails(pixels: torch.Tensor) -> torch.Tensor:
    """Return images (B, C, H, W), normalised, as uint8 (B, h, w, C), h and w at most THUMBNAIL."""
    import torch

    share = min(1.0, THUMBNAIL / max(pixels.shape[-2:]))
    size = [max(1, round(side * share)) for side in pixels.shape[-2:]]
    small = torch.nn.functional.interpolate(pixels.float(), size=size, mode="area")
    low, high = small.amin((1, 2, 3), keepdim=True), small.amax((1, 2, 3), keepdim=True)
    return (255 * (small - low) / (high - low).clamp(min=1e-6)).byte().permute(0, 2, 3, 1)


def picture(
    images: np.ndarray, sizes: np.ndarray, found: np.ndarray, truths: np.ndarray, names: Sequence[str]
) -> bytes:
    """Draw the first images with their objects, in white, and what was found, by category, as a PNG.

    Args:
        images: (N, h, w, C) uint8.
        sizes: (N, 2), height and width of the images that the boxes are in.
        found, truths: as above.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = min(DRAWN, len(images))
    rows = -(-count // 4)
    figure = Figure(figsize=(10, 2.6 * rows), layout="constrained")
    for number in range(count):
        axes = figure.add_subplot(rows, 4, number + 1)
        height, width = sizes[number]
        image = images[number] if images.shape[-1] == 3 else images[number, :, :, 0]
        axes.imshow(image, extent=(0, width, height, 0), cmap="gray", vmin=0, vmax=255)
        axes.set_axis_off()
        for row in truths[number][truths[number][:, 4] >= 0]:
            _box(axes, row, "white", ":" if row[5] else "-")
        for row in found[number][found[number][:, 4] >= SHOWN]:
            colour = colormaps["tab10"](int(row[5]) % 10)
            _box(axes, row, colour, "--")
            name = names[int(row[5])] if int(row[5]) < len(names) else str(int(row[5]))
            axes.text(row[0], row[1], f"{name} {row[4]:.2f}", color=colour, fontsize=6, va="bottom")
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    return file.getvalue()


def _box(axes: Any, row: np.ndarray, colour: Any, style: str) -> None:
    from matplotlib.patches import Rectangle

    corner, width, height = (float(row[0]), float(row[1])), float(row[2]), float(row[3])
    axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=colour, linestyle=style, linewidth=1.2))
