"""Files as streams of their content, whether they are compressed or not, and what kind of file a name says."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

DAMAGED = (EOFError, OSError, zlib.error, lzma.LZMAError)
"""What the decompressors raise for a file that is cut off or is not what its name says."""


def _zstandard(path: Path) -> io.BufferedReader:
    import pyarrow

    stream = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
    return io.BufferedReader(stream, 1 << 20)


COMPRESSED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _zstandard,
}


def kind(path: Path) -> str:
    """Return the suffix that says what a file holds, in lower case and without one for compression (".jsonl")."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSED else suffix


def compression(path: Path) -> str:
    """Return the suffix that says how a file is compressed, in lower case; "" where it is not."""
    suffix = path.suffix.lower()
    return suffix if suffix in COMPRESSED else ""


def open_content(path: Path) -> BinaryIO:
    """Open a file's content for reading, decompressed.

    Raises:
        EOFError: it is compressed by its name, and empty.
        OSError: it cannot be opened. Reading raises DAMAGED.
    """
    how = compression(path)
    if not how:
        return path.open("rb")
    if not path.stat().st_size:
        raise EOFError("an empty file is no archive")
    return cast(BinaryIO, COMPRESSED[how](path))
