"""A digest of a model folder's weights: by it a change shows that nobody who counts on them has asked for."""

from __future__ import annotations

import hashlib
from pathlib import Path

WHOLE = 1 << 30
"""Bytes of the largest file that is read whole; of a larger one, pages all over it."""
PAGES, PAGE = 1024, 1 << 12
_READ = 1 << 20
_DECIDING = ("*.safetensors", "config.json", "adapter_config.json", "base.json")


def of_folder(folder: Path) -> str:
    """Return the SHA-256 (hex) of a folder's weights, its config.json, and what it says of adapters."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in _DECIDING for path in folder.glob(pattern)):
        digest.update(f"{path.name} {path.stat().st_size} {_content(path)}\n".encode())
    return digest.hexdigest()


def read_in_pages(folder: Path) -> list[Path]:
    """Return the files of weights that are too large to be read whole, sorted."""
    return [path for path in sorted(folder.glob("*.safetensors")) if path.stat().st_size > WHOLE]


def _content(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if size <= WHOLE:
            while chunk := file.read(_READ):
                digest.update(chunk)
            return digest.hexdigest()
        for page in range(PAGES):
            file.seek(page * (size - PAGE) // (PAGES - 1))
            digest.update(file.read(PAGE))
    return digest.hexdigest()
