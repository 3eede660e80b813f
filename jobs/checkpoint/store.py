"""A folder of files on this machine's disk, or behind any URI that pyarrow knows (s3://, gs://, hdfs://, file://).

What is read from a store is asked for again while it fails (cluster/stores.py); whoever writes repeats the whole write.

Only what object stores can do as well: write a file whole or not at all, read parts of it, list, delete. Nothing is
renamed but a file that was just written on a disk, so what makes a set of files valid is written last
(jobs/checkpoint/catalog.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pyarrow import fs

from cluster import stores

CHUNK_BYTES = 8 << 20
Result = TypeVar("Result")
IN_FLIGHT_BYTES = 64 << 20
"""So much of a stream is on its way to an object store, in parts, before the next is taken."""

FLAT = ("s3", "gcs", "abfs")
"""Stores without folders: to make one is to write an object with the folder's name, at every write."""


@dataclass(frozen=True)
class Written:
    """What a file held when it was written."""

    size: int
    sha256: str


class Sink:
    """Takes a file's content, in order."""

    def __init__(self, stream: Any, settle: Callable[[], None] | None = None) -> None:
        """`settle` waits for what is on its way; None: nothing ever is."""
        self._stream, self._settle, self._waiting = stream, settle, 0

    def write(self, content: bytes | memoryview) -> None:
        """Write it; the buffer may change as soon as this returns."""
        if self._settle is None:
            self._stream.write(content)
            return
        self._stream.write(bytes(content))  # parts are sent by other threads, which keep what they are given
        self._waiting += len(content)
        if self._waiting >= IN_FLIGHT_BYTES:
            self._settle()
            self._waiting = 0


class Ranges:
    """A file of a store, read by ranges, each asked for again while the store fails: pyarrow's client does not."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def read_at(self, count: int, offset: int) -> bytes:
        """Return so many bytes from `offset` on, or as many as there are."""
        return stores.repeated(lambda: bytes(self._file.read_at(count, offset)))

    def size(self) -> int:
        """Return its bytes."""
        return int(self._file.size())

    def close(self) -> None:
        """Close it."""
        self._file.close()


class Store:
    """Files below one root, named by relative paths with forward slashes."""

    def __init__(self, root: str) -> None:
        """Open `root`: a directory, or a URI. Nothing is created before the first write."""
        self.root = root
        self._fs, self._base = stores.opened(root)
        self._is_local = isinstance(self._fs, fs.LocalFileSystem)

    @property
    def creates(self) -> bool:
        """Whether `new` is sure: of several who write a new file at once, one does."""
        return self._is_local

    def write(self, name: str, chunks: Iterable[Any], *, new: bool = False) -> Written:
        """Write a file from buffers and return its size and digest; on a local disk it has reached the disk then.

        Args:
            new: fail where there is such a file already. Object stores are only asked before.

        Raises:
            FileExistsError: there is, and it should be `new`. It stays as it was.
        """
        path = self._path(name)
        if self._fs.type_name not in FLAT:
            self._fs.create_dir(path.rpartition("/")[0])
        if not self._is_local:
            if new and self.exists(name):
                raise FileExistsError(f"there is {name} already")
            with self._whole_or_none(path) as stream:
                return _pour(stream, chunks)
        partial = f"{path}.{secrets.token_hex(4)}.partial"
        try:
            with open(partial, "wb", buffering=0) as stream:
                written = _pour(stream, chunks)
                os.fsync(stream.fileno())
            _place(partial, path, new)
        finally:
            Path(partial).unlink(missing_ok=True)
        return written

    @contextlib.contextmanager
    def stream(self, name: str) -> Iterator[Sink]:
        """Yield what a new file is written to as its content comes; it is on the disk, or stored, at the end.

        An error leaves what was written until then on a disk; in a store it leaves nothing, as far as that answers.

        Raises:
            FileExistsError: there is such a file, on a disk.
        """
        path = self._path(name)
        if not self._is_local:
            with self._whole_or_none(path) as stream:
                yield Sink(stream, stream.flush)
            return
        os.makedirs(path.rpartition("/")[0], exist_ok=True)
        with open(path, "xb") as file:
            yield Sink(file)
            file.flush()
            os.fsync(file.fileno())

    @contextlib.contextmanager
    def _whole_or_none(self, path: str) -> Iterator[Any]:
        """Yield a stream to a store; what an error leaves half written is removed, for closing it makes it a file."""
        stream = self._fs.open_output_stream(path)
        try:
            yield stream
        except BaseException:
            with contextlib.suppress(Exception):  # a part was refused: then it is no file either
                stream.close()
            with contextlib.suppress(Exception):  # not there, or a store that is gone and completes nothing
                self._fs.delete_file(path)
            raise
        stream.close()  # all of it or nothing: where that is refused, what was there before stays

    def _asked(self, call: Callable[[], Result]) -> Result:
        return call() if self._is_local else stores.repeated(call)

    def read(self, name: str) -> bytes:
        """Return a file's content; raise FileNotFoundError where there is none."""

        def once() -> bytes:
            with self._fs.open_input_file(self._path(name)) as stream:
                return bytes(stream.read())

        return self._asked(once)

    def open(self, name: str) -> Any:
        """Open a file for `read_at(nbytes, offset)`."""
        file = self._asked(lambda: self._fs.open_input_file(self._path(name)))
        return file if self._is_local else Ranges(file)

    def input(self, name: str) -> Any:
        """Open a file to read it from its beginning to its end."""
        return self._fs.open_input_stream(self._path(name))

    def digest(self, name: str) -> Written:
        """Read a whole file and return its size and digest."""
        return self._asked(lambda: self._digest(name))

    def _digest(self, name: str) -> Written:
        digest, size = hashlib.sha256(), 0
        with self.input(name) as stream:
            while chunk := stream.read(CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
        return Written(size, digest.hexdigest())

    def folders(self, below: str = "") -> list[str]:
        """List the folders right below the root, or one of its folders, sorted."""
        selector = fs.FileSelector(self._path(below) if below else self._base, allow_not_found=True)
        found = self._asked(lambda: self._fs.get_file_info(selector))
        return sorted(info.base_name for info in found if info.type == fs.FileType.Directory)

    def files(self, folder: str) -> list[str]:
        """List the files right in a folder, sorted; none where there is no folder."""
        selector = fs.FileSelector(self._path(folder), allow_not_found=True)
        found = self._asked(lambda: self._fs.get_file_info(selector))
        return sorted(info.base_name for info in found if info.type == fs.FileType.File)

    def tree(self, folder: str) -> list[str]:
        """List the files of a folder and of all folders in it, by their names within it, sorted."""
        path = self._path(folder)
        selector = fs.FileSelector(path, allow_not_found=True, recursive=True)
        found = self._asked(lambda: self._fs.get_file_info(selector))
        return sorted(info.path.removeprefix(f"{path}/") for info in found if info.type == fs.FileType.File)

    def exists(self, name: str) -> bool:
        """Say whether there is such a file."""
        found = self._asked(lambda: self._fs.get_file_info(self._path(name)))
        return bool(found.type == fs.FileType.File)

    def remove(self, folder: str) -> None:
        """Delete a folder with all its files; do nothing where there is none."""
        try:
            self._asked(lambda: self._fs.delete_dir(self._path(folder)))
        except FileNotFoundError:
            return

    def remove_file(self, name: str) -> None:
        """Delete a file; do nothing where there is none."""
        with contextlib.suppress(FileNotFoundError):
            self._asked(lambda: self._fs.delete_file(self._path(name)))

    def remove_files(self, folder: str, prefix: str) -> None:
        """Delete the files of a folder whose names begin so; and the folder, where a disk shows it empty then."""
        for name in self.files(folder):
            if name.startswith(prefix):
                self._asked(partial(self._fs.delete_file, self._path(f"{folder}/{name}")))
        if self._is_local:
            with contextlib.suppress(OSError):  # somebody else's files are there, or it is gone
                os.rmdir(self._path(folder))

    def locate(self, folder: str) -> str:
        """Return where a folder is, for people: a path, or a URI without a password and what else its store is told."""
        return f"{stores.shown(self.root).rstrip('/')}/{folder}"

    def _path(self, name: str) -> str:
        return f"{self._base}/{name}"


def _place(partial: str, path: str, new: bool) -> None:
    if new:
        try:
            os.link(partial, path)
            return
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            if os.path.exists(path):
                raise FileExistsError(path) from None
    os.replace(partial, path)


def _pour(stream: Any, chunks: Iterable[Any]) -> Written:
    digest, size = hashlib.sha256(), 0
    for chunk in chunks:
        for piece in _pieces(chunk):
            view = piece
            while view.nbytes:  # a raw file may take less at a time, as when a disk is full
                count = stream.write(view)
                view = view[count if count is not None else view.nbytes :]
            digest.update(piece)
            size += piece.nbytes
    return Written(size, digest.hexdigest())


def _pieces(chunk: Any) -> Iterable[memoryview]:
    """Cut a buffer into pieces small enough that hashing one finds it in the cache of the processor."""
    view = memoryview(chunk).cast("B")
    for start in range(0, len(view), CHUNK_BYTES):
        yield view[start : start + CHUNK_BYTES]
