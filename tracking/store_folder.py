"""The files of one folder in a store: read, sent, fetched, compared. A failure becomes a sentence with its URI."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from cluster import stores
from tracking.errors import TrackingError
from tracking.folder_manifest import File

CHUNK_BYTES = 8 << 20
IN_FLIGHT_BYTES = 64 << 20
"""So much of a file is on its way, in parts, before the next is read."""
FLAT = ("s3", "gcs", "abfs")
"""Stores that need no folder before a file in it, and may not let one be made."""
Result = TypeVar("Result")
Added = Callable[[int], None]


class Folder:
    """A folder in a store; files are named by relative paths with forward slashes."""

    def __init__(self, uri: str) -> None:
        """Open the folder; `uri` is as store_uri.checked returns it. Raises UserError: pyarrow opens no such URI."""
        from pyarrow import ArrowException, fs

        self.uri = uri
        try:
            self._fs, base = stores.opened(uri)
        except (OSError, ArrowException, ValueError, NotImplementedError) as error:
            raise TrackingError(f"{stores.shown(uri)} cannot be opened: {error}") from None
        self._base = base.rstrip("/")
        self._on_disk = isinstance(self._fs, fs.LocalFileSystem)

    def shown(self, name: str = "") -> str:
        """Return where a file is, or the folder, for people."""
        return f"{stores.shown(self.uri)}{'/' if name else ''}{name}"

    def read(self, name: str) -> str | None:
        """Return the content of a small file; None where there is none."""
        from pyarrow import ArrowException

        try:
            return stores.repeated(lambda: b"".join(self._chunks(name))).decode(errors="replace")
        except FileNotFoundError:
            return None
        except (OSError, ArrowException, ValueError) as error:
            raise self._failed(name, error) from None

    def sizes(self) -> dict[str, int]:
        """Return the files that are there, by name, with their bytes."""
        from pyarrow import fs

        selector = fs.FileSelector(self._base, recursive=True, allow_not_found=True)
        found = self._asked("", lambda: self._fs.get_file_info(selector))
        files = (info for info in found if info.type == fs.FileType.File)
        return {info.path.removeprefix(f"{self._base}/"): info.size for info in files}

    def digest(self, name: str) -> tuple[int, str]:
        """Read a file, and return its bytes and SHA-256 (hex)."""
        return self._asked(name, lambda: _taken(self._chunks(name), lambda chunk: None))

    def fetch(self, name: str, target: Path, added: Added) -> tuple[int, str]:
        """Write a file to the disk; return its bytes and SHA-256 (hex)."""

        def pour() -> tuple[int, str]:
            with target.open("wb") as file:

                def take(chunk: bytes) -> None:
                    file.write(chunk)
                    added(len(chunk))

                found = _taken(self._chunks(name), take)
                file.flush()
                os.fsync(file.fileno())
            return found

        return self._asked(name, pour)

    def send(self, source: Path, name: str, added: Added) -> None:
        """Write a file of this machine to the store."""

        def chunks() -> Iterator[bytes]:
            with source.open("rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    yield chunk
                    added(len(chunk))

        self._asked(name, lambda: self._write(name, chunks()))

    def write(self, name: str, text: str) -> None:
        """Write a small file."""
        self._asked(name, lambda: self._write(name, iter([text.encode()])))

    def forget(self, name: str) -> None:
        """Delete a file, where this is allowed: nothing depends on it."""
        with suppress(OSError):
            self._fs.delete_file(f"{self._base}/{name}")

    def check(self, name: str, file: File, found: tuple[int, str], why: str = "") -> None:
        """Refuse a file that is not what `folder.json` says.

        Raises:
            UserError: it names the file, and the way out.
        """
        if found != (file.bytes, file.sha256):
            raise TrackingError(
                f"{self.shown(name)} is not what was put there: it has {found[0]} bytes, SHA-256 {found[1][:12]}, not "
                f"{file.bytes} bytes, SHA-256 {file.sha256[:12]}: "
                f"{why or 'put it back, or put the model there again (tandem tracking upload)'}"
            )

    def _write(self, name: str, chunks: Iterator[bytes]) -> None:
        path = f"{self._base}/{name}"
        if self._fs.type_name not in FLAT:
            self._fs.create_dir(path.rpartition("/")[0])
        goal = f"{path}.{secrets.token_hex(4)}.partial" if self._on_disk else path
        with self._fs.open_output_stream(goal) as stream:
            waiting = 0
            for chunk in chunks:
                stream.write(chunk)
                waiting += len(chunk)
                if waiting >= IN_FLIGHT_BYTES:
                    stream.flush()
                    waiting = 0
        if self._on_disk:
            self._fs.move(goal, path)

    def _chunks(self, name: str) -> Iterator[bytes]:
        with self._fs.open_input_stream(f"{self._base}/{name}") as stream:
            while chunk := stream.read(CHUNK_BYTES):
                yield chunk

    def _asked(self, name: str, call: Callable[[], Result]) -> Result:
        from pyarrow import ArrowException

        try:
            return stores.repeated(call)
        except (OSError, ArrowException, ValueError) as error:
            raise self._failed(name, error) from None

    def _failed(self, name: str, error: Exception) -> TrackingError:
        missing = isinstance(error, FileNotFoundError)
        reason = "it is not there" if missing else str(error) or type(error).__name__
        out = "put it back, or put the model there again" if missing else "see that this machine may reach the store"
        return TrackingError(
            f"{self.shown(name)}, of a model in a store: {reason}. {out[0].upper()}{out[1:]} (its credentials come "
            "from the environment)"
        )


def partial_of(path: Path) -> Path:
    """Return a name beside a path for what is not whole yet."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


def _taken(chunks: Iterator[bytes], take: Callable[[bytes], Any]) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    for chunk in chunks:
        digest.update(chunk)
        size += len(chunk)
        take(chunk)
    return size, digest.hexdigest()
