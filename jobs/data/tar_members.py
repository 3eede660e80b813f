"""The members of a tar archive, one after the other, out of a stream: nothing is extracted, and nothing is passed by.

`tarfile` ends in silence at a header that is damaged, as at an archive that breaks off between two members, and keeps
a record of all members; so the headers alone are its work here (`TarInfo.frombuf`), and what is between them is not.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = 512
MOST_HEADER_BYTES = 1 << 20
"""A member's long name and the like take less."""
READ_BYTES = 16 << 20
_ENDS = "its end is not marked, so it is cut off, or was never finished"


class BrokenTarError(OSError):
    """An archive breaks off, or something in it is no member."""


@dataclass(frozen=True)
class Member:
    """A file in an archive, or a link to one."""

    name: str
    """Without `./` before it."""
    at: int
    """The byte of the stream where its first header begins."""
    size: int
    is_link: bool = False
    """True where its content is elsewhere: it has none itself."""


class Archive:
    """The members of a stream, whose content can be read while they are under way."""

    def __init__(self, file: BinaryIO, size: int | None, at: int = 0) -> None:
        """Take a stream that stands at byte `at`.

        Args:
            size: the bytes up to its end, so that content that is not read can be leapt over; None: not known.
        """
        self._file, self._size, self._at = file, size, at
        self._left = 0
        """So many bytes of the member under way, and what fills its last block, are not read."""
        self._last = "its beginning"

    def members(self, end: int | None = None) -> Iterator[Member]:
        """Yield the files and links, up to byte `end` where that is given, else up to the end of the stream.

        Raises:
            BrokenTarError: it breaks off, its end is not marked, or something in it is no member.
        """
        while end is None or self._at + self._left < end:
            self._skip()
            begins = self._at
            header = self._header()
            if header is None:
                self._check_rest()
                return
            if header.isreg() or header.type not in tarfile.SUPPORTED_TYPES:
                self._left = -(-header.size // BLOCK) * BLOCK
            name = header.name.removeprefix("./").lstrip("/")
            self._last = name or self._last
            if header.isfile():
                yield Member(name, begins, header.size)
            elif header.issym() or header.islnk():
                yield Member(name, begins, 0, is_link=True)

    def content(self, member: Member) -> bytes:
        """Return the content of the member that was yielded last."""
        content = self._read(member.size)
        self._left -= member.size
        return content

    def _header(self) -> tarfile.TarInfo | None:
        """Return the next header with what those before it say of it; None at the mark of the end."""
        name, size = "", None
        while True:
            block = self._file.read(BLOCK)
            if not block:
                raise BrokenTarError(f"nothing follows {self._last}: {_ENDS}" if self._at else "the file is empty")
            self._at += len(block)
            if len(block) < BLOCK:
                raise BrokenTarError(f"it breaks off behind {self._last}")
            if not any(block):
                return None
            found = self._parsed(block)
            if found.type == tarfile.GNUTYPE_LONGNAME:
                name = self._said(found).rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif found.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                told = _records(self._said(found), self._last)
                if any(key.startswith("GNU.sparse.") for key in told):
                    self._refuse_sparse(told.get("GNU.sparse.name", found.name))
                name = told.get("path", name)
                size = int(told["size"]) if told.get("size", "").isdecimal() else size
            elif found.type in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
                self._said(found)
            elif found.type == tarfile.GNUTYPE_SPARSE:
                self._refuse_sparse(found.name)
            else:
                found.name, found.size = name or found.name, found.size if size is None else size
                return found

    def _parsed(self, block: bytes) -> tarfile.TarInfo:
        try:
            return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            at = self._at - BLOCK
            what = f"what follows {self._last} is no member (byte {at})" if at else "it is no tar archive"
            raise BrokenTarError(f"{what}: {error}") from error

    def _refuse_sparse(self, name: str) -> None:
        raise BrokenTarError(f"{name} is stored without its empty blocks, which is not read: pack it without --sparse")

    def _said(self, header: tarfile.TarInfo) -> bytes:
        """Return the content of a header that is about the next member."""
        if header.size > MOST_HEADER_BYTES:
            raise BrokenTarError(f"a header of {header.size} bytes follows {self._last}")
        content = self._read(header.size)
        self._left = -header.size % BLOCK
        self._skip()
        return content

    def _check_rest(self) -> None:
        """Refuse what stands behind the mark of the end; to read on is also what checks a compressed file's sum."""
        while block := self._file.read(1 << 20):
            if any(block):
                raise BrokenTarError(
                    f"there is more behind its end, which follows {self._last}: archives that were joined are named "
                    "one by one, and what was deleted in one is gone when it is packed anew"
                )

    def _skip(self) -> None:
        """Pass over what is left of the member under way."""
        if self._size is not None and self._left > BLOCK:
            if self._at + self._left > self._size:
                raise BrokenTarError(f"it breaks off in {self._last}")
            self._at = self._file.seek(self._at + self._left)
        else:
            for begin in range(0, self._left, READ_BYTES):
                self._read(min(READ_BYTES, self._left - begin))
        self._left = 0

    def _read(self, size: int) -> bytes:
        """Read so many bytes, in pieces: a size that a damaged header names may be any number."""
        pieces = []
        while size:
            piece = self._file.read(min(size, READ_BYTES))
            if not piece:
                raise BrokenTarError(f"it breaks off in {self._last}")
            pieces.append(piece)
            size -= len(piece)
            self._at += len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _records(content: bytes, last: str) -> dict[str, str]:
    """Return what a pax header says: records "LENGTH KEY=VALUE", of which LENGTH counts all bytes (POSIX.1-2001)."""
    found, at = dict[str, str](), 0
    while at < len(content) and content[at : at + 1] != b"\0":
        blank = content.find(b" ", at, at + 20)
        length = content[at:blank]
        if blank < 0 or not length.isdigit() or not blank < at + int(length) <= len(content):
            raise BrokenTarError(f"a header that says nothing that can be read follows {last}")
        key, _, value = content[blank + 1 : at + int(length) - 1].partition(b"=")
        found[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        at += int(length)
    return found
