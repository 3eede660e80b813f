"""Image files to pixels: one reading for training and serving, of bytes alone, so that no caller names a path.

What is chosen here, for every file: the first frame; upright, as EXIF says; transparent pixels on white; palettes and
other colour spaces as RGB; grey of 16 bits stays grey of 16 bits. Pixels without a known range are refused.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.tasks import TaskError

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Read at all. Pillow's others are left out on purpose: EPS starts a program, and a server's clients send files."""

MAX_PIXELS = 2**26
"""Width times height of the largest file that is unpacked; a few kilobytes can stand for gigapixels."""

DEEP_GREY = ("I;16", "I;16B", "I;16L", "I;16N")
BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262
"""Tags of TIFF."""
ORIENTATION = 0x0112
"""The tag of EXIF: 1 is upright, 2 to 8 turned or mirrored."""
GREY = ("1", "L", "LA", "La")
TRANSPARENT = ("LA", "La", "PA", "RGBA", "RGBa")


@dataclass(frozen=True)
class Picture:
    """Pixels, and what was chosen to get them."""

    pixels: np.ndarray
    """(H, W, C) uint8 or uint16, C 1 or 3."""
    on_white: bool = False
    """It had transparent pixels."""
    first_of_several: bool = False
    """The file holds more frames or pages than this one."""
    turned: bool = False
    """The file holds it turned or mirrored, and says so."""


def decode(content: bytes) -> Picture:
    """Return the picture in a file's bytes.

    Raises:
        TaskError: no whole image of a known format, too many pixels, or pixels without a known range.
    """
    from PIL import Image, UnidentifiedImageError

    with pillow_errors():
        try:
            opened = Image.open(io.BytesIO(content), formats=FORMATS)
        except UnidentifiedImageError:
            begins = f"{len(content)} bytes that begin with {content[:8]!r}" if content else "no bytes"
            raise TaskError(f"this is no image in {', '.join(FORMATS)}: {begins}") from None
        with opened:
            return picture(opened)


@contextmanager
def pillow_errors() -> Iterator[None]:
    """Turn what Pillow raises into TaskError; its readers raise many kinds on a broken file."""
    try:
        yield
    except TaskError:
        raise
    except Exception as error:
        raise TaskError(f"cannot read an image: {error}") from error


def picture(image: Image) -> Picture:
    """Return what an opened image shows.

    Raises:
        TaskError: too many pixels, or pixels without a known range. Pillow's own errors pass through.
    """
    from PIL import ImageOps

    if image.width * image.height > MAX_PIXELS:
        raise TaskError(
            f"an image of {image.width} x {image.height} has more than {MAX_PIXELS} pixels: send it smaller"
        )
    _refuse_deep_colour(image)
    several = bool(getattr(image, "is_animated", False))
    stretched = image.format == "PPM"  # more than 8 bits: Pillow has scaled them to 0 … 65535, whatever their range
    image.load()
    white_is_zero = _is_inverted(image)
    turned = image.getexif().get(ORIENTATION, 1) in range(2, 9)
    pixels, on_white = _pixels(ImageOps.exif_transpose(image), stretched)
    pixels = np.uint16(65535) - pixels if white_is_zero else pixels
    return Picture(pixels if pixels.ndim == 3 else pixels[:, :, None], on_white, several, turned)


def _refuse_deep_colour(image: Image) -> None:
    """Refuse colour, or grey with transparency, of 16 bits: Pillow would read 8 of them without a word.

    Raises:
        TaskError: its pixels are.
    """
    for tile in getattr(image, "tile", ()):  # how the file says its pixels are stored, before they are read
        stored, *rest = tile.args if isinstance(tile.args, tuple) else (tile.args,)
        deep = str(stored).partition(";")[2].startswith("16") and not str(stored).startswith("I;")
        if deep or (image.format == "PPM" and stored == "RGB" and rest and rest[0] > 255):
            raise TaskError(
                f"an image in {image.mode} with 16 bits per channel is not read, since 8 of them would be lost: save "
                "it with 8 bits, or in grey with 16"
            )


def _is_inverted(image: Image) -> bool:
    """Tell a TIFF in grey of more than 8 bits in which 0 is white: Pillow turns those of 8 bits only.

    Raises:
        TaskError: it has fewer than 16 bits, which Pillow reads as the dark end of 16.
    """
    tags: Any = getattr(image, "tag_v2", None)
    if not tags or image.mode not in DEEP_GREY:
        return False
    bits = tags.get(BITS_PER_SAMPLE, (16,))[0]
    if bits != 16:
        raise TaskError(f"a TIFF with {bits} bits per pixel is not read: save it with 8 or 16")
    return bool(tags.get(PHOTOMETRIC) == 0)


def _pixels(image: Image, stretched: bool) -> tuple[np.ndarray, bool]:
    """Return pixels (H, W) or (H, W, 3), and whether some of them were transparent."""
    mode: str = image.mode
    if mode in DEEP_GREY or (mode == "I" and stretched):
        return _deep(image)
    if mode == "F" or mode.startswith("I"):
        kind = "floating-point numbers" if mode == "F" else "32-bit integers"
        raise TaskError(f"an image of {kind} has no known range from black to white: save it with 8 or 16 bits")
    wanted = "L" if mode in GREY else "RGB"
    if mode not in TRANSPARENT and "transparency" not in image.info:
        return np.asarray(image.convert(wanted)), False
    return _composed(image, wanted)


def _deep(image: Image) -> tuple[np.ndarray, bool]:
    pixels = np.asarray(image).astype(np.uint16)
    clear: Any = image.info.get("transparency")
    if not isinstance(clear, int) or not (pixels == clear).any():
        return pixels, False
    return np.where(pixels == clear, np.uint16(65535), pixels), True


def _composed(image: Image, wanted: str) -> tuple[np.ndarray, bool]:
    """Lay an image over white."""
    from PIL import Image

    layer = image.convert("RGBA")
    if layer.getextrema()[3][0] == 255:  # opaque throughout
        return np.asarray(layer.convert("RGB").convert(wanted)), False
    white = Image.new("RGBA", layer.size, "white")
    return np.asarray(Image.alpha_composite(white, layer).convert("RGB").convert(wanted)), True
