"""What a file is: its bytes' digest, or the reason why they cannot be read."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO

from cluster.errors import UserError


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
    digest = hashlib.sha256()
    try:
        with open_or_say(path) as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise UserError(f"data: cannot read {path}: {error.strerror}") from error
    return digest.hexdigest()
