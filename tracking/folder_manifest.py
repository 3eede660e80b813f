"""`folder.json`: every file of a model's folder in a store, with size and SHA-256. Pure, but for reading a folder.

Its own digest stands for the whole model.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from tracking import manifest
from tracking.errors import TrackingError

MANIFEST = "folder.json"
FORMAT = 1
WEIGHTS = ".safetensors"
MOST_HEADER_BYTES = 100_000_000
"""The library safetensors reads no longer ones."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class File:
    """One file of a model's folder."""

    bytes: int
    sha256: str
    """In hex."""
    elements: int | None = None
    """Of weights that a node fetches only when they are asked for: those of their tensors, together."""


@dataclass(frozen=True)
class StoredFolder:
    """What a model's folder in a store holds."""

    files: Mapping[str, File]
    """By relative name, with forward slashes."""

    @cached_property
    def text(self) -> str:
        """The content of `folder.json`: the same files give the same text."""
        files = {name: {k: v for k, v in asdict(file).items() if v is not None} for name, file in self.files.items()}
        return json.dumps({"format": FORMAT, "files": files}, indent=1, sort_keys=True) + "\n"

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of `folder.json`."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def weights(self) -> dict[str, File]:
        """What a node leaves in the store until it is asked for."""
        return {name: file for name, file in self.files.items() if file.elements is not None}

    @property
    def here(self) -> dict[str, File]:
        """What a node fetches at once."""
        return {name: file for name, file in self.files.items() if file.elements is None}

    def without(self, names: Collection[str]) -> StoredFolder:
        """Return the folder without some files."""
        return replace(self, files={name: file for name, file in self.files.items() if name not in names})

    @classmethod
    def of(cls, folder: Path, lazily: bool, without: Collection[str] = ()) -> StoredFolder:
        """Digest the files of a folder.

        Args:
            lazily: weights right in the folder are of those that nodes fetch only when they are asked for.
            without: names to leave out.
        """
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        names = [name for name in names if name not in without and name != f".{manifest.FILE_NAME}.partial"]
        files = {}
        for name in names:
            found = manifest.digest_of(folder / name)
            is_weights = lazily and "/" not in name and name.endswith(WEIGHTS) and not name.startswith("adapter_")
            files[name] = File(found.bytes, found.sha256, elements(folder / name) if is_weights else None)
        return cls(files)

    @classmethod
    def parsed(cls, text: str, where: str) -> StoredFolder:
        """Read a `folder.json`; what it holds comes from anywhere.

        Args:
            where: what people call it.

        Raises:
            TrackingError: it is damaged, of a newer Tandem, or names what no upload writes.
        """
        try:
            found = json.loads(text)
            if found["format"] > FORMAT:
                raise TrackingError(f"{where} has format {found['format']}, this Tandem reads up to {FORMAT}: update")
            folder = cls({str(name): File(**about) for name, about in found["files"].items()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TrackingError(_damaged(where, f"{type(error).__name__}: {error}")) from None
        if folder.text != text:
            raise TrackingError(_damaged(where, "it is not as an upload writes it"))
        for name, file in folder.files.items():
            if problem := _strange(name, file):
                raise TrackingError(_damaged(where, problem))
        return folder


def _damaged(where: str, reason: str) -> str:
    return f"{where} does not say what the model's folder holds ({reason}): put the model there again"


def _strange(name: str, file: File) -> str | None:
    """Say what no upload writes: names that lead out of the folder, and figures that are none."""
    pure = PurePosixPath(name)
    if not name or pure.is_absolute() or ".." in pure.parts or pure.as_posix() != name or "\\" in name:
        return f"{name!r} lies outside the folder"
    counts = [file.bytes] if file.elements is None else [file.bytes, file.elements]
    if any(type(count) is not int or count < 0 for count in counts):
        return f"{name!r} has {file}"
    if not isinstance(file.sha256, str) or not _SHA256.fullmatch(file.sha256):
        return f"{name!r} has {file}"
    if file.elements is not None and ("/" in name or not name.endswith(WEIGHTS)):
        return f"{name!r} is no file of weights"
    return None


def elements(path: Path) -> int | None:
    """Return how many numbers a safetensors file holds, by its header; None for a file that has none."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header: Any = json.loads(file.read(length)) if 0 < length <= MOST_HEADER_BYTES else None
            shapes = [entry["shape"] for name, entry in header.items() if name != "__metadata__"]
            return sum(math.prod(shape) for shape in shapes)
        except (ValueError, AttributeError, KeyError, TypeError):
            return None
