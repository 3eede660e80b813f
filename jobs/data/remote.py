"""Files behind a URI, read by ranges: s3://, gs://, abfs://, hdfs:// (what pyarrow opens), hf://datasets/….

A `Remote` has of a path what the readers ask for. Which files a URI names: jobs/data/remote_listing.py. What one holds
is known by the mark that its store gives it, since to digest every byte is to fetch every byte each time.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeAlias

from cluster import stores
from cluster.errors import UserError
from cluster.stores import shown
from jobs.data.examples import Cut

VERSION = 1
"""Raise it when a mark, or the parts that a remote file is read in, become others."""
BUFFER_BYTES = 1 << 20
"""So much is asked for at a time."""
LINE_BYTES = 64 << 10
"""So much is looked through at a time for the end of a line, and read ahead of what the hub is asked for."""
HUB = "hf://datasets"


@dataclass(frozen=True)
class Remote:
    """A file of a store. Any process can be sent it."""

    store: str
    """The URI of the store: "s3://bucket?endpoint_override=…"."""
    path: str
    """Its name there, without a slash at the beginning."""
    size: int
    """Bytes."""
    mark: str
    """What tells its content from another: an ETag, the SHA-256 of the hub, or else when it was changed."""

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self._pure.name

    @property
    def suffix(self) -> str:
        """The last suffix of its name."""
        return self._pure.suffix

    @property
    def suffixes(self) -> list[str]:
        """All suffixes of its name."""
        return self._pure.suffixes

    @property
    def stem(self) -> str:
        """Its name without the last suffix."""
        return self._pure.stem

    @property
    def uri(self) -> str:
        """The whole URI."""
        place, mark, query = self.store.partition("?")
        return f"{place}/{self.path}{mark}{query}"

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the mark and the size: what stands for the content."""
        return hashlib.sha256(f"remote {self.size} {self.mark}".encode()).hexdigest()

    def __str__(self) -> str:
        """Return the URI as people are shown it: without a password, or what else its store needs to be told."""
        return f"{shown(self.store)}/{self.path}"

    def is_file(self) -> bool:
        """Return that it is one: nothing else is listed."""
        return True

    def native(self) -> Any:
        """Open it for pyarrow's own readers.

        Raises:
            UserError: it cannot be opened.
        """
        files, base = opened_store(self.store)
        try:
            return stores.repeated(lambda: files.open_input_file(f"{base}{self.path}"))
        except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
            raise UserError(f"data: cannot read {self}: {said(error)}") from error

    def open(self, mode: str = "rb", buffer_bytes: int = BUFFER_BYTES) -> BinaryIO:
        """Open its bytes. What the store fails by is a UserError then: the data is as good as it was."""
        assert mode == "rb", "data is only read"
        return io.BufferedReader(_Raw(self), buffer_bytes)

    @property
    def _pure(self) -> PurePosixPath:
        return PurePosixPath(self.path)


Place: TypeAlias = Path | Remote
"""A file that is read, on this machine's disks or in a store."""


class _Raw(io.RawIOBase):
    """The bytes of a remote file, each read a range of it."""

    def __init__(self, of: Remote) -> None:
        super().__init__()
        self._of, self._file = of, of.native()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._file.seek(offset, whence)
        return int(self._file.tell())

    def tell(self) -> int:
        return int(self._file.tell())

    def readinto(self, buffer: Any) -> int:
        at = self.tell()

        def once() -> bytes:
            self._file.seek(at)
            return bytes(self._file.read(len(buffer)))

        try:
            content = stores.repeated(once)
        except OSError as error:  # not that of a damaged file, which may be left out
            raise UserError(f"data: cannot read {self._of} on: {said(error)}") from error
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


@cache
def opened_store(uri: str) -> tuple[Any, str]:
    """Return the file system of a store and what stands before the names of its files, with a slash at its end.

    Raises:
        UserError: no store that can be opened.
    """
    try:
        if uri == HUB:
            from huggingface_hub import HfFileSystem
            from pyarrow import fs

            return fs.PyFileSystem(fs.FSSpecHandler(HfFileSystem(block_size=LINE_BYTES))), "datasets/"
        files, base = stores.opened(uri)
    except (OSError, ValueError, NotImplementedError) as error:
        raise UserError(
            f"data: {shown(uri)} is no store that can be opened: {said(error)}; files are read from disks, from "
            "s3://, gs://, abfs:// and hdfs://, and from hf://; download what lies elsewhere"
        ) from error
    return files, base if not base or base.endswith("/") else f"{base}/"


def said(error: Exception) -> str:
    """Return the first line of what a store's client says."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def line_cuts(file: Remote, size: int) -> tuple[Cut, ...]:
    """Cut a remote file of lines where file_digests.digest_and_cuts cuts it, looking at a few lines of it only.

    How many lines are before a part is not known then: `before` is -1.

    Args:
        size: the first line that begins at a multiple of so many bytes, or behind it, begins a part.

    Raises:
        UserError: it cannot be read.
    """
    begins, wanted = [0], size
    with file.open(buffer_bytes=LINE_BYTES) as content:
        while wanted < file.size and (begin := _line_behind(content, wanted - 1)) < file.size:
            begins.append(begin)
            wanted = (begin // size + 1) * size
    ends = [*begins[1:], file.size]
    return tuple(Cut(at, end, -1, end - at) for at, end in zip(begins, ends, strict=True) if end > at)


def _line_behind(content: BinaryIO, at: int) -> int:
    """Return where the line begins that follows the first end of a line at or behind `at`; the end where none does."""
    content.seek(at)
    while block := content.read(LINE_BYTES):
        if found := block.find(b"\n") + 1:
            return at + found
        at += len(block)
    return at
