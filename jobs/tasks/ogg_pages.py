"""Whether an Ogg file is whole: its decoders pass over pages that are cut off, missing or damaged, and say nothing.

A page (RFC 3533, section 6) is `OggS`, 23 bytes of header with the stream's number, the page's own and a checksum, a
table of lengths, and as many bytes as these are together.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

_HEADER = 27
_SERIAL, _NUMBER, _CHECKSUM = (slice(at, at + 4) for at in (14, 18, 22))
_MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def fault(content: bytes) -> str | None:
    """Return what is wrong with the pages of an Ogg file, in words; None where nothing is."""
    numbers: dict[bytes, int] = {}
    for page in _pages(content):
        if page is None:
            return "the sound file is cut off, or broken: it does not end with a whole page"
        number = int.from_bytes(page[_NUMBER], "little")
        if number != numbers.get(page[_SERIAL], number - 1) + 1:
            return f"the sound file is broken: page {number} does not follow its page {numbers[page[_SERIAL]]}"
        numbers[page[_SERIAL]] = number
        if _checksum(page) != int.from_bytes(page[_CHECKSUM], "little"):
            return f"the sound file is broken: the checksum of its page {number} is another"
    return None


def _pages(content: bytes) -> Iterator[bytes | None]:
    """Yield the pages; None, as the last, for what is no whole page."""
    at = 0
    while at < len(content):
        header = content[at : at + _HEADER]
        table = content[at + _HEADER : at + _HEADER + header[-1]] if len(header) == _HEADER else b""
        end = at + _HEADER + len(table) + sum(table)
        if not header.startswith(b"OggS") or len(header) < _HEADER or len(table) < header[-1] or end > len(content):
            yield None
            return
        yield content[at:end]
        at = end


def _checksum(page: bytes) -> int:
    """Return the checksum of a page: the polynomial of zlib's, highest bit first, from 0 on, its own place as 0."""
    zeroed = page[: _CHECKSUM.start] + bytes(4) + page[_CHECKSUM.stop :]
    mirrored = zlib.crc32(zeroed.translate(_MIRRORED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{mirrored:032b}"[::-1], 2)
