"""What a file is: its bytes' digest, where it can be cut, or the reason why it cannot be read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from cluster.errors import UserError
from jobs.data import opening, unchanged
from jobs.data.examples import Cut


def open_or_say(path: Path) -> BinaryIO:
    """Open a file's bytes.

    Raises:
        UserError: it cannot be opened.
    """
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"data: cannot read {path}: {error.strerror}") from error


def file_digest(path: Path) -> str:
    """Return the SHA-256 (hex) of a file.

    Raises:
        UserError: it cannot be read.
    """
    return str(unchanged.found(path, "sha256", partial(_digest, path)))


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    for chunk in _chunks(path):
        digest.update(chunk)
    return digest.hexdigest()


def digest_and_cuts(path: Path, size: int) -> tuple[str, tuple[Cut, ...]]:
    """Return the SHA-256 (hex) of a file of lines, and the parts to read it in: cut where a line begins.

    Args:
        size: the first line that begins at a multiple of so many bytes, or behind it, begins a part.

    Raises:
        UserError: it cannot be read.
    """
    read = partial(_digest_and_cuts, path, size)
    try:
        digest, cuts = unchanged.found(path, f"sha256, cut by {size}", read)
        return str(digest), tuple(Cut(*cut) for cut in cuts)
    except (TypeError, ValueError):  # a damaged note
        digest, cuts = read()
        return str(digest), tuple(Cut(*cut) for cut in cuts)


def _digest_and_cuts(path: Path, size: int) -> list[Any]:
    digest, at, lines, wanted = hashlib.sha256(), 0, 0, size
    begins = [(0, 0)]  # byte, lines before it
    for chunk in _chunks(path):
        digest.update(chunk)
        counted = 0
        while found := chunk.find(b"\n", max(0, wanted - 1 - at)) + 1:
            lines += chunk.count(b"\n", counted, found)
            counted = found
            begins.append((at + found, lines))
            wanted = ((at + found) // size + 1) * size
        lines += chunk.count(b"\n", counted)
        at += len(chunk)
    ends = [byte for byte, _ in begins[1:]] + [at]
    cuts = [[byte, end, before, end - byte] for (byte, before), end in zip(begins, ends, strict=True) if end > byte]
    return [digest.hexdigest(), cuts]


def _chunks(path: Path) -> Iterator[bytes]:
    try:
        with open_or_say(path) as file:
            while chunk := file.read(1 << 20):
                opening.count(len(chunk))
                yield chunk
    except OSError as error:
        raise UserError(f"data: cannot read {path}: {error.strerror}") from error
