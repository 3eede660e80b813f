"""Generated pictures of shapes with their boxes, for trying object detection where no pictures are at hand.

    python -m jobs.data.corpora_shapes shapes/ --count 200     # the same as files: shapes/annotations.json, COCO's form

Circles, squares and triangles of one colour each, one to four in a picture of 64 by 64 pixels, on a noisy ground; they
may overlap by a fifth. The pictures are the same on every machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jobs.data.examples import Example, Rows, Source

NAME = "generated-shapes"
VERSION = 1
"""Raise it when other pictures are made: rows encoded before are not used."""
COUNT, SIDE = 2000, 64
CATEGORIES = ("circle", "square", "triangle")
OVERLAP = 0.2


def pictures(count: int, seed: int = 0) -> Iterator[tuple[np.ndarray, list[dict[str, Any]]]]:
    """Yield pictures, uint8 (64, 64, 3), each with the boxes [x, y, width, height] and categories of its objects."""
    draw = np.random.Generator(np.random.PCG64(seed))
    for _ in range(count):
        pixels = draw.integers(0, 90, (SIDE, SIDE, 3)).astype(np.uint8)
        objects: list[dict[str, Any]] = []
        for _ in range(int(draw.integers(1, 5))):
            size = int(draw.integers(10, 29))
            left, top = (int(draw.integers(0, SIDE - size + 1)) for _ in range(2))
            category = CATEGORIES[int(draw.integers(0, 3))]
            colour = draw.integers(120, 256, 3)
            if any(_overlap([left, top, size, size], other["bbox"]) > OVERLAP for other in objects):
                continue
            pixels[top : top + size, left : left + size][_inside(category, size)] = colour
            objects.append({"bbox": [left, top, size, size], "category": category})
        yield pixels, objects


def _inside(category: str, size: int) -> np.ndarray:
    """Return which pixels of a square (size, size) a shape fills."""
    rows, columns = (np.indices((size, size)) + 0.5) / size - 0.5
    if category == "circle":
        filled: np.ndarray = rows**2 + columns**2 <= 0.25
    elif category == "square":
        filled = np.ones((size, size), dtype=bool)
    else:
        filled = np.abs(columns) <= (rows + 0.5) / 2
    return filled


def _overlap(one: list[int], other: list[int]) -> float:
    """Return which share of the smaller of two boxes the other one covers."""
    sides = [min(one[i] + one[i + 2], other[i] + other[i + 2]) - max(one[i], other[i]) for i in (0, 1)]
    return max(sides[0], 0) * max(sides[1], 0) / min(one[2] * one[3], other[2] * other[3])


def source() -> Source:
    """Return the corpus."""

    def read() -> Rows:
        for number, (pixels, objects) in enumerate(pictures(COUNT)):
            yield Example({"image": pixels, "objects": objects}, f"{NAME}, picture {number}")

    return Source(NAME, f"{NAME} {VERSION} {COUNT}", read, f"{NAME} {VERSION}")


def write(folder: Path, count: int, seed: int = 0) -> None:
    """Write pictures as PNG files in `folder`/images, and annotations.json, as COCO has them."""
    from PIL import Image

    (folder / "images").mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    boxes: list[dict[str, Any]] = []
    for number, (pixels, objects) in enumerate(pictures(count, seed)):
        name = f"{number:05d}.png"
        Image.fromarray(pixels).save(folder / "images" / name)
        images.append({"id": number, "file_name": name, "width": SIDE, "height": SIDE})
        for each in objects:
            category = CATEGORIES.index(each["category"]) + 1
            area = each["bbox"][2] * each["bbox"][3]
            boxes.append({"id": len(boxes) + 1, "image_id": number, "category_id": category, "area": area,
                                "bbox": each["bbox"], "iscrowd": 0})  # fmt: skip
    categories = [{"id": number, "name": name} for number, name in enumerate(CATEGORIES, 1)]
    whole = {"images": images, "annotations": boxes, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(whole), encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Write pictures of shapes into a folder."""
    parser = argparse.ArgumentParser(prog="python -m jobs.data.corpora_shapes", description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    write(given.folder, given.count, given.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
