"""Frames: what crosses a connection, each with its length in front; pure, so that any bytes can be tried.

    length (4 bytes, big-endian) | msgpack: [kind, stream, content]

A chunk of text is by far the most frequent, and has a form of its own: its fields stand in the frame itself.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple

from serve.channel import codec
from serve.channel.codec import CodecError
from serve.wire import CallPiece, Chunk, ScoredToken

HEADER_BYTES = 4
MOST_BYTES = 1 << 30
"""Of one frame: arrays of the largest bodies that a gateway takes."""
MOST_BYTES_UNKNOWN = 1024
"""Of a frame from somebody who has not shown that it knows the secret."""


class Kind(IntEnum):
    """What a frame says, and who says it."""

    HELLO = 1
    """Replica: version, nonce."""
    PROOF = 2
    """Gateway: version, nonce, proof that it knows the secret."""
    WELCOME = 3
    """Replica: its own proof, slots, whether it leaves."""
    CALL = 4
    """Gateway: a call begins a stream."""
    CANCEL = 5
    """Gateway: nobody waits for the stream any more."""
    MESSAGE = 6
    """Replica: one message of the stream."""
    CHUNK = 7
    """Replica: a message that is a chunk of text."""
    END = 8
    """Replica: the stream is complete."""
    BUSY = 9
    """Replica: it has too much to take the call."""
    MOVED = 10
    """Replica: it leaves; another one is to go on."""
    FAILED = 11
    """Replica: its code failed on the call; its log says how."""
    PING = 12
    """Gateway: are you there?"""
    PONG = 13
    """Replica: yes."""
    LOAD = 14
    """Replica: calls that it has of other gateways."""
    LEAVING = 15
    """Replica: no calls from now on."""


class Frame(NamedTuple):
    """One frame. `stream` is 0 for what concerns the whole connection."""

    kind: int
    stream: int
    content: Any = None


class FrameError(ValueError):
    """Bytes that no peer of ours sends: the connection ends."""


def encode(kind: Kind, stream: int = 0, content: Any = None) -> bytes:
    """Return a frame as bytes, its length in front.

    Raises:
        TypeError: the content has something that cannot be sent.
        ValueError: it is nested too deeply, or larger than a frame may be.
    """
    if type(content) is Chunk:
        chunk = content
        fields = (chunk.text, chunk.completion_tokens, chunk.finish_reason, chunk.tokens, chunk.calls, chunk.ids)
        body = codec.pack_loosely((Kind.CHUNK.value, stream, fields))
    else:
        body = codec.pack([kind.value, stream, content])
    if len(body) > MOST_BYTES:
        raise ValueError(f"a message of {len(body):,} bytes is larger than the {MOST_BYTES:,} that may be sent")
    return len(body).to_bytes(HEADER_BYTES, "big") + body


def decode(body: bytes | memoryview, known: bool = True) -> Frame:
    """Return the frame whose bytes after the length these are. Raises FrameError.

    `known`: whether who sent it has shown that it knows the secret; else it may send msgpack's own types only.
    """
    try:
        kind, stream, content = codec.unpack(body) if known else codec.unpack_plain(body)
        if type(kind) is not int or type(stream) is not int:
            raise FrameError("a frame without kind and stream")
        return Frame(kind, stream, _chunk(*content) if kind == Kind.CHUNK else content)
    except (CodecError, TypeError, ValueError) as error:
        raise FrameError(str(error)) from error


def _chunk(text: str, count: int, reason: Any, tokens: Any, calls: Any, ids: Any) -> Chunk:
    scored = tuple(_scored(*token) for token in tokens) if tokens else ()
    pieces = tuple(CallPiece(*piece) for piece in calls) if calls else ()
    return Chunk(text, count, reason, scored, pieces, tuple(ids))


def _scored(raw: bytes, logprob: float | None, top: Any, offset: int) -> ScoredToken:
    return ScoredToken(raw, logprob, tuple((token, value) for token, value in top), offset)


class Splitter:
    """Cuts what arrives into frames, however it was cut on its way."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self.most_bytes = most_bytes
        """Longest frame that is taken; it may change between frames."""
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Take more bytes; return the bodies of the frames that are complete now.

        Raises:
            FrameError: a frame is announced that is longer than may be.
        """
        buffer = self._buffer
        buffer += data
        bodies, at = [], 0
        while len(buffer) - at >= HEADER_BYTES:
            length = int.from_bytes(buffer[at : at + HEADER_BYTES], "big")
            if length > self.most_bytes:
                raise FrameError(f"a frame of {length:,} bytes; at most {self.most_bytes:,} may be")
            end = at + HEADER_BYTES + length
            if end > len(buffer):
                break
            bodies.append(bytes(buffer[at + HEADER_BYTES : end]))
            at = end
        del buffer[:at]
        return bodies
