"""A digest of a model folder's weights: by it a change shows that nobody who counts on them has asked for."""

from __future__ import annotations

import hashlib
from pathlib import Path

from cluster import stored_weights

WHOLE = 1 << 30
"""Bytes of the largest file that is read whole; of a larger one, pages all over it."""
PAGES, PAGE = 1024, 1 << 12
_READ = 1 << 20
_DECIDING = ("*.safetensors", "config.json", "adapter_config.json", "base.json")


def of_folder(folder: Path) -> str:
    """Return the SHA-256 (hex) of a folder's weights, its config.json, and what it says of adapters.

    Of weights that lie in a store it takes what the folder says of them: what is fetched is compared with that.
    """
    digest = hashlib.sha256()
    here = [path for pattern in _DECIDING for path in folder.glob(pattern)]
    lines = {path.name: f"{path.name} {path.stat().st_size} {_content(path)}\n" for path in here}
    stored = stored_weights.read(folder)
    for name, file in stored.files.items() if stored is not None else ():
        lines.setdefault(name, f"{name} {file.bytes} {file.sha256}\n")
    for name in sorted(lines):
        digest.update(lines[name].encode())
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
