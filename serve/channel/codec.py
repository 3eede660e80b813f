"""Values ↔ bytes: msgpack, with a code for each class that may cross and for what msgpack does not know. No pickle.

What comes out is what went in: tuples stay tuples, numpy arrays keep datatype and shape, whole numbers may have any
size. What has no code is refused by name. Whatever bytes come, `unpack` returns a value or raises CodecError: the
nesting of extensions is bounded, so that no bytes can exhaust the stack.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import msgpack
import numpy as np

from serve.wire import (
    CallPiece,
    Chunk,
    EmbedCall,
    GenerateCall,
    Identity,
    InferCall,
    Inferred,
    Opened,
    Refused,
    ScoredToken,
    Tools,
    Vectors,
)

TUPLE, WHOLE, ARRAY, SCALAR = range(4)
CLASSES: dict[int, type] = {
    16: GenerateCall,
    17: Tools,
    18: Identity,
    19: Opened,
    20: Chunk,
    21: ScoredToken,
    22: CallPiece,
    23: Refused,
    24: InferCall,
    25: Inferred,
    26: EmbedCall,
    27: Vectors,
}
"""What may cross, by its code. A code that was given once is not given to another class."""
CODES = {kind: code for code, kind in CLASSES.items()}
ARRAY_KINDS = "?biufcSUmM"
"""Kinds of numpy's datatypes that are plain bytes: no objects, no records."""
PLAIN: tuple[type[Any], ...] = (int, float, str, bytes, list, dict)
MOST_DEPTH = 32
"""Extensions inside each other; the deepest value of ours has four."""


class CodecError(ValueError):
    """Bytes that are no value."""


def _names(kind: Any) -> list[str]:
    return [each.name for each in fields(kind)] if is_dataclass(kind) else list(kind._fields)


_FIELDS = {kind: _names(kind) for kind in CODES}
SCHEMA = hashlib.sha256(
    repr({code: (kind.__name__, _names(kind)) for code, kind in CLASSES.items()}).encode()
).hexdigest()
"""Digest of the classes and their fields: two ends of which one has another do not talk."""


def pack(value: Any) -> bytes:
    """Return a value as bytes.

    Raises:
        TypeError: it holds something that has no code; its type is named.
        ValueError: it is nested too deeply, or too large.
    """
    packed: bytes = msgpack.packb(value, default=_extension, strict_types=True, unicode_errors="surrogatepass")
    return packed


def pack_loosely(value: Any) -> bytes:
    """Return lists, tuples, numbers, text and bytes as bytes; tuples become lists. Four times as fast."""
    packed: bytes = msgpack.packb(value, unicode_errors="surrogatepass")
    return packed


def unpack(data: bytes | memoryview) -> Any:
    """Return the value that `data` is. Raises CodecError."""
    return _unpack(data, 0)


def unpack_plain(data: bytes | memoryview) -> Any:
    """The same from somebody unknown: nothing but msgpack's own types, so that no class and no array is built."""
    return _unpack(data, PLAIN_ONLY)


def _unpack(data: bytes | memoryview, depth: int) -> Any:
    try:
        return msgpack.unpackb(
            data, ext_hook=_HOOKS[depth], strict_map_key=False, unicode_errors="surrogatepass", raw=False
        )
    except CodecError:
        raise
    except Exception as error:  # whatever msgpack, numpy or a class raise of bytes that are no value
        raise CodecError(f"bytes that are no value: {type(error).__name__}") from error


def _extension(value: Any) -> Any:
    kind = type(value)
    if kind is tuple:
        return msgpack.ExtType(TUPLE, pack(list(value)))
    if code := CODES.get(kind):
        return msgpack.ExtType(code, pack([getattr(value, name) for name in _FIELDS[kind]]))
    if isinstance(value, np.ndarray | np.generic):
        return _array(value)
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        return msgpack.ExtType(WHOLE, value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True))
    if isinstance(value, tuple):
        return _extension(tuple(value))
    if plain := next((each for each in PLAIN if isinstance(value, each)), None):
        return plain(value)  # of a class of somebody's own over it
    raise TypeError(f"a {kind.__module__}.{kind.__qualname__} cannot be sent: use numbers, text, bytes or numpy arrays")


def _array(value: Any) -> Any:
    if value.dtype.kind not in ARRAY_KINDS:
        raise TypeError(f"a numpy array of {value.dtype} cannot be sent: use numbers, text or bytes")
    code = ARRAY if isinstance(value, np.ndarray) else SCALAR
    data = value.tobytes() if value.dtype.itemsize else b""  # numpy makes one character of an empty text
    return msgpack.ExtType(code, pack([value.dtype.str, list(value.shape), data]))


def _revive(depth: int, code: int, data: bytes) -> Any:
    if code == WHOLE:
        return int.from_bytes(data, "little", signed=True)
    content = _unpack(data, depth)
    if code == TUPLE:
        return tuple(content)
    if code in (ARRAY, SCALAR):
        return _revived_array(code, *content)
    if kind := CLASSES.get(code):
        return kind(*content)
    raise CodecError(f"an extension {code} that is not known")


def _revived_array(code: int, datatype: str, shape: list[int], data: bytes) -> Any:
    if type(datatype) is not str or not all(type(each) is int and each >= 0 for each in shape):
        raise CodecError("an array whose shape is none")  # -1 means "as many as there are" to numpy, which divides
    dtype = np.dtype(datatype)
    if dtype.kind not in ARRAY_KINDS or len(data) != math.prod(shape) * dtype.itemsize:
        raise CodecError("an array whose datatype and shape are not those of its bytes")
    array = np.ndarray(tuple(shape), dtype, bytearray(data))  # a copy: whoever gets it may write into it
    return array if code == ARRAY else array[()]


def _too_deep(code: int, data: bytes) -> Any:
    raise CodecError("extensions are nested too deeply")


def _not_plain(code: int, data: bytes) -> Any:
    raise CodecError(f"an extension {code} from somebody who has not shown that it knows the secret")


_HOOKS: list[Callable[[int, bytes], Any]] = [partial(_revive, depth) for depth in range(1, MOST_DEPTH + 1)]
_HOOKS += [_too_deep, _not_plain]
PLAIN_ONLY = MOST_DEPTH + 1
