"""Weights that lie in an object store, apart from the folder of their model: what `weights.json` there says of them.

    model/weights.json       the store, the folder in it, and of each file of weights its name, size and SHA-256
          config.json, the tokenizer, tandem.json, …      as beside weights that are here

Whoever needs the weights themselves asks cluster/weights_cache.py for a folder that has them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from cluster import stores
from cluster.errors import UserError

FILE_NAME = "weights.json"
CHUNK_BYTES = 8 << 20
LOOK_S = 10.0
"""So long a store may fail while somebody waits for an answer at a terminal."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
Result = TypeVar("Result")


@dataclass(frozen=True)
class StoredFile:
    """One file of weights."""

    bytes: int
    sha256: str
    """In hex."""
    elements: int
    """Of its tensors, together."""


@dataclass(frozen=True)
class Stored:
    """Where a model's weights are, and what they are."""

    store: str
    """A URI that pyarrow knows (s3://, gs://, hdfs://, file://), or an absolute path."""
    folder: str
    """In the store, with forward slashes."""
    files: Mapping[str, StoredFile]
    """By name."""

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.bytes for file in self.files.values())

    def uri(self, name: str = "") -> str:
        """Return where a file is, or the folder of all, for people. Pure."""
        return "/".join(each for each in (stores.shown(self.store).rstrip("/"), self.folder, name) if each)

    def write(self, directory: Path) -> None:
        """Say so in the folder of a model."""
        (directory / FILE_NAME).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    def lacking(self, directory: Path) -> list[str]:
        """Return the files that are not in a folder with the size that they should have, sorted."""
        return sorted(name for name, file in self.files.items() if _size(directory / name) != file.bytes)


def read(directory: Path | str) -> Stored | None:
    """Return where the weights of a model's folder are; None for a folder that has them, and for a hub id.

    Raises:
        UserError: its `weights.json` is damaged.
    """
    path = Path(directory) / FILE_NAME
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from None
    try:
        files = {str(name): StoredFile(**about) for name, about in found["files"].items()}
        stored = Stored(str(found["store"]), str(found["folder"]), files)
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from None
    for problem in _strange(stored):
        raise _damaged(path, problem)
    return stored


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path} does not say where the weights are ({reason}): copy the model again")


def _strange(stored: Stored) -> Iterator[str]:
    """Yield what no export writes: a folder from anywhere names only files of weights, and none outside its own."""
    if not stored.folder or not stored.files or ".." in PurePosixPath(stored.folder).parts:
        yield f"folder {stored.folder!r} with {len(stored.files)} files"
    for name, file in stored.files.items():
        if PurePosixPath(name).name != name or not name.endswith(".safetensors"):
            yield f"{name!r} is no file of weights"
        counts = all(type(number) is int and number >= 0 for number in (file.bytes, file.elements))
        if not counts or not isinstance(file.sha256, str) or not _SHA256.fullmatch(file.sha256):
            yield f"{name!r} has {file}"


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def size(directory: Path) -> int:
    """Return the bytes of a folder's weights that lie in a store; 0 where they are in the folder."""
    stored = read(directory)
    return stored.bytes if stored is not None else 0


def look(directory: Path | str, what: str) -> None:
    """Ask the store whether a folder's weights are there, each in its size; nothing of them is read.

    Args:
        what: what the user calls the model.

    Raises:
        UserError: one is not, or the store does not answer.
    """
    stored = read(directory)
    if stored is None:
        return
    for name in stored.lacking(Path(directory)):
        found = asked(stored, name, lambda name=name: _opened(stored, name).size(), LOOK_S)  # type: ignore[misc]
        if found != stored.files[name].bytes:
            raise UserError(f"{what}: {changed(stored, name, f'it has {found} bytes')}")


def verify(directory: Path) -> None:
    """Read the weights that lie in a store whole, and compare them with what the folder says of them.

    Raises:
        UserError: one is missing, or another one.
    """
    stored = read(directory)
    for name in sorted(stored.files) if stored is not None else ():
        assert stored is not None
        found = asked(stored, name, lambda name=name: _digest(stored, name))  # type: ignore[misc]
        if found != stored.files[name].sha256:
            raise UserError(changed(stored, name, f"its SHA-256 is {found[:12]}"))


def _digest(stored: Stored, name: str) -> str:
    digest = hashlib.sha256()
    for chunk in chunks(stored, name):
        digest.update(chunk)
    return digest.hexdigest()


def changed(stored: Stored, name: str, found: str) -> str:
    """Return the sentence about a file that is another one than was exported. Pure."""
    file = stored.files[name]
    return (
        f"{stored.uri(name)} is not what was exported: {found}, and {FILE_NAME} says {file.bytes} bytes, SHA-256 "
        f"{file.sha256[:12]}. Put it back, or export the model again"
    )


def chunks(stored: Stored, name: str) -> Iterator[bytes]:
    """Yield the content of a file, in order.

    Raises:
        OSError: it cannot be read.
    """
    filesystem, path = _place(stored, name)
    with filesystem.open_input_stream(path) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk


def _opened(stored: Stored, name: str) -> Any:
    filesystem, path = _place(stored, name)
    return filesystem.open_input_file(path)


def _place(stored: Stored, name: str) -> tuple[Any, str]:
    filesystem, base = stores.opened(stored.store)
    return filesystem, f"{base.rstrip('/')}/{stored.folder}/{name}"


def asked(stored: Stored, name: str, call: Callable[[], Result], patience_s: float | None = None) -> Result:
    """Return what a call to the store returns, which may fail for a moment.

    Args:
        patience_s: so long; None: as long as an outage of a minute lasts.

    Raises:
        UserError: it goes on failing, or what was asked for is not there.
    """
    from pyarrow import ArrowException

    try:
        return stores.repeated(call, patience_s=patience_s)
    except FileNotFoundError:
        reason = "it is not there"
    except (OSError, ArrowException, ValueError) as error:
        reason = str(error)
    raise UserError(
        f"{stored.uri(name)}, which holds weights of the model, cannot be read: {reason}. Put it back, or see that "
        "this machine may read it (its credentials and address come from the environment)"
    )
