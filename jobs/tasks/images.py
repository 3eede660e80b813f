"""Images as arrays of pixels: read, resized, and added up exactly."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jobs.tasks import TaskError


@dataclass(frozen=True)
class PixelSums:
    """Exact sums over pixel values of 0 … 255, per channel: the same in whatever order they are added."""

    pixels: int = 0
    sums: tuple[int, ...] = ()
    squares: tuple[int, ...] = ()

    @classmethod
    def of(cls, pixels: np.ndarray) -> PixelSums:
        """Sum uint8 (H, W, C) over H and W."""
        values = pixels.reshape(-1, pixels.shape[2]).astype(np.int64)
        return cls(len(values), tuple(values.sum(0).tolist()), tuple((values * values).sum(0).tolist()))

    def __add__(self, other: PixelSums) -> PixelSums:
        if not (self.pixels and other.pixels):
            return self if self.pixels else other
        sums = tuple(a + b for a, b in zip(self.sums, other.sums, strict=True))
        squares = tuple(a + b for a, b in zip(self.squares, other.squares, strict=True))
        return PixelSums(self.pixels + other.pixels, sums, squares)

    def mean_and_deviation(self) -> tuple[list[float], list[float]]:
        """Return the mean and the standard deviation per channel, of values scaled to 0 … 1."""
        means = [total / self.pixels / 255 for total in self.sums]
        # In integers until the end: the difference of two large floats would lose the variance of a dark image.
        scaled = [self.pixels * q - total * total for q, total in zip(self.squares, self.sums, strict=True)]
        return means, [max(value**0.5 / self.pixels / 255, 1e-3) for value in scaled]


def read_image(image: Any) -> np.ndarray:
    """Return an image (array, bytes of a file, or path) as uint8 (H, W, C).

    Raises:
        TaskError: no image in a known form.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        if isinstance(image, dict) and "bytes" in image:  # how Hugging Face datasets keep an image in Parquet
            image = image["bytes"] or image["path"]
        if isinstance(image, bytes | str | Path):
            opened = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
            image = np.asarray(opened if opened.mode in ("L", "RGB") else opened.convert("RGB"))
        array = np.asarray(image)
    except (UnidentifiedImageError, OSError) as error:
        raise TaskError(f"cannot read an image: {error}") from error
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.dtype == object:
        raise TaskError(f"an image is an array (H, W) or (H, W, C), this one has the shape {array.shape}")
    return array if array.dtype == np.uint8 else np.clip(np.rint(array), 0, 255).astype(np.uint8)


def resize(pixels: np.ndarray, size: tuple[int, int], channels: int) -> np.ndarray:
    """Bring uint8 (H, W, C) to the given size and number of channels (1 or 3), bilinear."""
    from PIL import Image

    if pixels.shape == (*size, channels):
        return pixels
    mode = {1: "L", 3: "RGB"}.get(channels)
    if mode is None or pixels.shape[2] not in (1, 3):
        raise TaskError(f"images have {pixels.shape[2]} channels and the model {channels}; both must be 1 or 3")
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).convert(mode)
    resized = np.asarray(image.resize((size[1], size[0]), Image.Resampling.BILINEAR))
    return resized[:, :, None] if channels == 1 else resized
