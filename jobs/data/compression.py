"""Files as streams of their content, whether they are compressed or not, and what kind of file a name says."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePath
from typing import Any, BinaryIO, cast

from jobs.data.remote import Place, Remote

DAMAGED = (EOFError, OSError, zlib.error, lzma.LZMAError)
"""What the decompressors raise for a file that is cut off or is not what its name says."""


def _zstandard(path: Place) -> io.BufferedReader:
    import pyarrow

    file = pyarrow.OSFile(str(path)) if isinstance(path, Path) else path.native()
    return io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"), 1 << 20)


def _of_python(how: Callable[[Any], Any], path: Place) -> Any:
    """Have a decompressor of Python's read a file: it opens one of a disk itself."""
    return how(path if isinstance(path, Path) else path.open())


def _gzip(path: Any) -> gzip.GzipFile:
    return gzip.GzipFile(path) if isinstance(path, Path) else gzip.GzipFile(fileobj=path)


OTHERS = {
    rb"\x1f\x8b\x08": "gzip: end its name in .gz",
    rb"\x28\xb5\x2f\xfd": "Zstandard: end its name in .zst",
    rb"BZh[1-9]1AY&SY": "bzip2: end its name in .bz2",
    rb"\xfd7zXZ\x00": "xz: end its name in .xz",
    rb"PK\x03\x04": "a zip archive, or a workbook: unpack it",
    rb"PAR1\x15": "Parquet: end its name in .parquet",
    rb"ARROW1\x00": "Arrow: save it as Parquet",
    rb"SQLite format 3\x00": "a database: save its rows as JSON lines",
    rb"\xff\xfe|\xfe\xff": "text in UTF-16: convert it to UTF-8",
}
"""How files begin (patterns) that are not the text that their name says, and what to do with them."""
BEGINNING = 16
"""So many bytes decide."""
COMPRESSED: dict[str, Callable[[Place], Any]] = {
    ".gz": partial(_of_python, _gzip),
    ".bz2": partial(_of_python, bz2.BZ2File),
    ".xz": partial(_of_python, lzma.LZMAFile),
    ".zst": _zstandard,
}
BOTH = {".tgz": (".tar", ".gz")}
"""Suffixes that say what a file holds and how it is compressed."""


def kind(path: PurePath | Remote) -> str:
    """Return the suffix that says what a file holds, in lower case and without one for compression (".jsonl")."""
    suffix = path.suffix.lower()
    if suffix in BOTH:
        return BOTH[suffix][0]
    return PurePath(path.stem).suffix.lower() if suffix in COMPRESSED else suffix


def compression(path: PurePath | Remote) -> str:
    """Return the suffix that says how a file is compressed, in lower case; "" where it is not."""
    suffix = path.suffix.lower()
    return BOTH[suffix][1] if suffix in BOTH else suffix if suffix in COMPRESSED else ""


def size_of(path: Place) -> int:
    """Return a file's bytes."""
    return path.stat().st_size if isinstance(path, Path) else path.size


def other_content(path: Place) -> str | None:
    """Say what a file of text holds instead, by its first bytes; None where these may be text.

    Raises:
        EOFError, OSError, …: as `open_content` and reading.
    """
    with open_content(path) as file:
        begins = file.read(BEGINNING)
    return next((what for pattern, what in OTHERS.items() if re.match(pattern, begins)), None)


def open_content(path: Place) -> BinaryIO:
    """Open a file's content for reading, decompressed.

    Raises:
        EOFError: it is compressed by its name, and empty.
        OSError: it cannot be opened. Reading raises DAMAGED.
    """
    how = compression(path)
    if not how:
        return path.open("rb")
    if not size_of(path):
        raise EOFError("an empty file is no archive")
    return cast(BinaryIO, COMPRESSED[how](path))
