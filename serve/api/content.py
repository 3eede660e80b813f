"""Bodies as they were before they were coded for the way: bounded, and unpacked where Content-Encoding says so."""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterable, Callable

from serve.api.body import ApiError

CODINGS = {"gzip": 31, "x-gzip": 31, "deflate": 15}
"""Content codings that are read, and zlib's window bits for them."""


async def read(
    parts: AsyncIterable[bytes], coding: str | None, most: int, grow: Callable[[int], None] = lambda size: None
) -> bytes:
    """Read a body of at most `most` bytes, giving up as soon as it is larger: the server in front accepts any size.

    Args:
        coding: the header Content-Encoding.
        grow: is told how many bytes are held, and raises where they are too many.

    Raises:
        ApiError: 413 too large, packed or unpacked; 415 a coding that is not read; 400 broken.
    """
    unpack = unpacker(coding, most)
    raw = bytearray()
    taken = 0
    async for part in parts:
        taken += len(part)
        raw += part if unpack is None else unpack.feed(part)
        if max(taken, len(raw)) > most:
            raise _too_large(most)
        grow(len(raw))
    if unpack is not None:
        unpack.finish()
    return bytes(raw)


def check_length(said: str | None, most: int) -> None:
    """Refuse, 413, a body whose Content-Length is too large before any of it has come."""
    if said and said.isascii() and said.isdigit() and (len(said) > 18 or int(said) > most):
        raise _too_large(most)


def unpacker(coding: str | None, most: int) -> Unpacker | None:
    """Return what unpacks the coding; None where there is none. Raises ApiError, 415, for one that is not read."""
    name = (coding or "").strip().lower()
    if name in ("", "identity"):
        return None
    if name not in CODINGS:
        known = "gzip, deflate"
        message = f"content-encoding {name!r:.40} is not read here; send the body plain, or as {known}"
        raise ApiError(415, message, code="unsupported_encoding", headers={"accept-encoding": known})
    return Unpacker(name, CODINGS[name], most)


class Unpacker:
    """Unpacks a body part by part, never more than one byte beyond the bound."""

    def __init__(self, name: str, window_bits: int, most: int) -> None:
        self._name, self._window_bits = name, window_bits
        self._left = most + 1
        self._member = zlib.decompressobj(window_bits)
        self._any = False

    def feed(self, part: bytes) -> bytes:
        """Return what a part unpacks to. A gzip body may hold several members."""
        unpacked = bytearray()
        while part and self._left > 0:
            if self._member.eof:
                self._next_member(part)
            unpacked += self._unpacked(part)
            part = self._member.unused_data
            self._any = True
        return bytes(unpacked)

    def finish(self) -> None:
        """Raise ApiError if the body ended too early."""
        if not (self._any and self._member.eof):
            raise self._broken("it ends too early")

    def _unpacked(self, part: bytes) -> bytes:
        try:
            unpacked = self._member.decompress(part, self._left)
        except zlib.error as error:
            raise self._broken(str(error).rpartition(": ")[2]) from None
        self._left -= len(unpacked)
        return unpacked

    def _next_member(self, part: bytes) -> None:
        if self._window_bits != CODINGS["gzip"]:
            raise self._broken(f"{len(part)} bytes follow its end")
        self._member = zlib.decompressobj(self._window_bits)

    def _broken(self, why: str) -> ApiError:
        return ApiError(400, f"the body is no valid {self._name}: {why}", code="invalid_encoding")


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is larger than {most} bytes", code="body_too_large")
