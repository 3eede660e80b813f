"""Images as arrays of pixels: checked, resized, and added up exactly. Files are read in jobs/tasks/image_files.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jobs.tasks import TaskError
from jobs.tasks.image_files import Picture, decode, picture, pillow_errors

LARGEST = {8: 255, 16: 65535}
"""White, by bits per pixel and channel."""


COUNTED = {
    "on_white": "images have transparent pixels and were put on white",
    "several": "image files hold several frames or pages, of which the first is used",
    "turned": "image files say that they lie turned or mirrored, and were brought upright",
    "narrowed": "images have 16 bits and were rounded to the 8 of the model that the job starts from",
    "resized": "images have another size and were resized",
    "stretched": "images have other proportions and were stretched or squeezed",
    "greyed": "images have colours and were made grey",
}
"""What is counted of images: name → what it is."""


@dataclass(frozen=True)
class PixelSums:
    """Exact sums over pixel values of 0 … 65535, per channel: the same in whatever order they are added."""

    pixels: int = 0
    sums: tuple[int, ...] = ()
    squares: tuple[int, ...] = ()

    @classmethod
    def of(cls, pixels: np.ndarray) -> PixelSums:
        """Sum uint8 or uint16 (H, W, C) over H and W."""
        values = deepened(pixels, 16).reshape(-1, pixels.shape[2]).astype(np.int64)
        return cls(len(values), tuple(values.sum(0).tolist()), tuple((values * values).sum(0).tolist()))

    def __add__(self, other: PixelSums) -> PixelSums:
        if not (self.pixels and other.pixels):
            return self if self.pixels else other
        sums = tuple(a + b for a, b in zip(self.sums, other.sums, strict=True))
        squares = tuple(a + b for a, b in zip(self.squares, other.squares, strict=True))
        return PixelSums(self.pixels + other.pixels, sums, squares)

    def mean_and_deviation(self) -> tuple[list[float], list[float]]:
        """Return the mean and the standard deviation per channel, of values scaled to 0 … 1."""
        means = [total / self.pixels / 65535 for total in self.sums]
        # In integers until the end: the difference of two large floats would lose the variance of a dark image.
        scaled = [self.pixels * q - total * total for q, total in zip(self.squares, self.sums, strict=True)]
        return means, [max(value**0.5 / self.pixels / 65535, 1e-3) for value in scaled]


def read_picture(image: Any) -> Picture:
    """Return an image of the training data: an array, the bytes of a file, a path, or one that Pillow has opened.

    Raises:
        TaskError: no image in a known form; with the path where there is one.
    """
    from PIL import Image

    if isinstance(image, Mapping) and "bytes" in image:  # how Hugging Face datasets keep an image in Parquet
        image = image["bytes"] or image.get("path")
    if isinstance(image, str | Path):
        return _read_file(Path(image))
    if isinstance(image, Image.Image):
        with pillow_errors():
            return picture(image)
    return sent_picture(np.asarray(image) if isinstance(image, list | tuple) else image)


def read_image(image: Any) -> np.ndarray:
    """Return an image of the training data as pixels, uint8 or uint16 (H, W, C). Raises TaskError."""
    return read_picture(image).pixels


def sent_picture(image: Any) -> Picture:
    """Return an image that a client may have sent: an array, or the bytes of a file. A str is never opened.

    Raises:
        TaskError: anything else, or an array that is no image.
    """
    if isinstance(image, bytes | bytearray | memoryview):
        return decode(bytes(image))
    if isinstance(image, np.ndarray):
        return Picture(_checked(image))
    hint = '; send a file as base64, with "parameters": {"content_type": "base64"}' if isinstance(image, str) else ""
    raise TaskError(f"an image is an array of numbers or the bytes of a file, not {image!r:.60}{hint}")


def counts(pictures: Sequence[Picture], size: tuple[int, int], channels: int, bits: int) -> dict[str, np.ndarray]:
    """Tell of each picture what `COUNTED` names, on its way to a size, a number of channels and of bits: int32 (N,)."""
    told = [
        {
            "on_white": picture.on_white,
            "several": picture.first_of_several,
            "turned": picture.turned,
            "narrowed": bits_of(picture.pixels) > bits,
            "resized": picture.pixels.shape[:2] != size,
            "stretched": picture.pixels.shape[0] * size[1] != picture.pixels.shape[1] * size[0],
            "greyed": picture.pixels.shape[2] > channels,
        }
        for picture in pictures
    ]
    return {name: np.array([each[name] for each in told], dtype=np.int32) for name in COUNTED}


def deepened(pixels: np.ndarray, bits: int) -> np.ndarray:
    """Bring pixels (H, W, C) to uint8 or uint16; from 8 bits to 16 is exact, from 16 to 8 rounds."""
    if pixels.dtype == (np.uint8 if bits == 8 else np.uint16):
        return pixels
    if bits == 16:
        return pixels.astype(np.uint16) * np.uint16(257)
    return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)


def bits_of(pixels: np.ndarray) -> int:
    """Return the bits of each value of pixels (H, W, C): 8 of uint8, 16 of uint16."""
    return 8 * pixels.dtype.itemsize


def resize(pixels: np.ndarray, size: tuple[int, int], channels: int) -> np.ndarray:
    """Bring uint8 or uint16 (H, W, C) to the given size and number of channels (1 or 3), bilinear."""
    if pixels.shape == (*size, channels):
        return pixels
    if channels not in (1, 3) or pixels.shape[2] not in (1, 3):
        raise TaskError(f"images have {pixels.shape[2]} channels and the model {channels}; both must be 1 or 3")
    if pixels.dtype == np.uint16:
        return _resized_deep(_recoloured(pixels, channels), size)
    return _resized(pixels, size, {1: "L", 3: "RGB"}[channels])


def _resized(pixels: np.ndarray, size: tuple[int, int], mode: str) -> np.ndarray:
    from PIL import Image

    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).convert(mode)
    resized = np.asarray(image.resize((size[1], size[0]), Image.Resampling.BILINEAR))
    return resized[:, :, None] if resized.ndim == 2 else resized


def _resized_deep(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    from PIL import Image

    planes = [Image.fromarray(plane.astype(np.float32)) for plane in np.moveaxis(pixels, 2, 0)]
    resized = [np.asarray(plane.resize((size[1], size[0]), Image.Resampling.BILINEAR)) for plane in planes]
    return np.clip(np.rint(np.stack(resized, axis=2)), 0, 65535).astype(np.uint16)


def _recoloured(pixels: np.ndarray, channels: int) -> np.ndarray:
    """Make uint16 (H, W, C) grey or colour; grey is the luma that Pillow computes (ITU-R 601-2)."""
    if pixels.shape[2] == channels:
        return pixels
    if channels == 3:
        return np.repeat(pixels, 3, axis=2)
    luma = pixels.astype(np.int64) @ np.array([19595, 38470, 7471])
    return ((luma + 0x8000) >> 16).astype(np.uint16)[:, :, None]


def _read_file(path: Path) -> Picture:
    try:
        if path.exists() and not path.is_file():
            raise TaskError("is no regular file, and is not opened")
        return decode(path.read_bytes())
    except TaskError as error:
        raise TaskError(f"{path}: {error}") from error
    except OSError as error:
        raise TaskError(f"cannot read {path}: {error.strerror}") from error


def _checked(array: np.ndarray) -> np.ndarray:
    """Return an array as pixels, uint8 or uint16 (H, W, C), if its values say what is black and what is white."""
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.dtype == object or not array.size:
        raise TaskError(f"an image is an array (H, W) or (H, W, C) of numbers, this one has the shape {array.shape}")
    if array.dtype in (np.uint8, np.uint16):
        return array
    if array.dtype.kind not in "iu":
        wrong = f"an array of {array.dtype} has no known range from black to white"
        raise TaskError(f"{wrong}: give an image as whole numbers, 0 to 255 (or uint16, 0 to 65535)")
    outside = array[(array < 0) | (array > 255)]
    if outside.size:
        raise TaskError(f"an image's values are 0 to 255 (or uint16, 0 to 65535); this one holds {outside.flat[0]}")
    return array.astype(np.uint8)
