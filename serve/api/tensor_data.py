"""The data of the Open Inference Protocol's tensors: JSON or binary to numpy, and back. Pure functions.

Nothing is guessed: the data must be what datatype and shape say, number for number. BYTES become lists of str (as JSON
has them) or bytes (base64 or binary), nested as the shape says.
"""

from __future__ import annotations

import base64
import binascii
import math
import struct
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from serve.api.body import shown
from serve.tensors import DATATYPES, OutputTensor

LENGTH = struct.Struct("<I")
"""What stands before each element of BYTES in binary form."""


class DataError(ValueError):
    """Data that is not what its tensor says."""


def from_json(datatype: str, shape: Sequence[int], data: list[Any]) -> Any:
    """Return a JSON tensor's data, flat or nested, as an array of `shape`, or as str nested so.

    Raises:
        DataError: another number of values, another nesting, or values that the datatype does not have.
    """
    flat, dims = _flattened(data)
    _check_nesting(shape, dims, len(flat))
    wanted = _kinds(datatype)
    if not set(map(type, flat)) <= wanted:
        at = next(i for i, value in enumerate(flat) if type(value) not in wanted)
        raise DataError(f"value {at} is {shown(flat[at])}, which is no {datatype}")
    if datatype == "BYTES":
        return nested(flat, shape)
    return _converted(datatype, flat).reshape(shape)


def from_bytes(datatype: str, shape: Sequence[int], raw: memoryview) -> Any:
    """Return a binary tensor's data: little-endian, row-major, as an array of `shape`, or as bytes nested so.

    Raises:
        DataError: another size, or values that the datatype does not have.
    """
    count = math.prod(shape)
    if datatype == "BYTES":
        return nested(_elements(raw, count), shape)
    dtype = DATATYPES[datatype]
    if len(raw) != count * dtype.itemsize:
        raise DataError(f"{datatype} of shape {list(shape)} takes {count * dtype.itemsize} bytes, not {len(raw)}")
    if datatype == "BOOL":
        _refuse(np.frombuffer(raw, np.uint8) > 1, "is neither 0 nor 1, as a BOOL is")
    array = np.frombuffer(raw, dtype.newbyteorder("<")).astype(dtype)
    if dtype.kind == "f":
        _refuse(~np.isfinite(array), "is NaN or infinite")
    return array.reshape(shape)


def decoded(texts: Any, name: str = "data") -> Any:
    """Turn base64 into bytes, in lists of any depth.

    Raises:
        DataError: an element is no base64; `name` says which.
    """
    if isinstance(texts, list):
        return [decoded(text, f"{name}[{i}]") for i, text in enumerate(texts)]
    try:
        return base64.b64decode(texts, validate=True)
    except (binascii.Error, ValueError):
        text = texts if isinstance(texts, str) else texts[:80].decode(errors="replace")
        raise DataError(f"{name} is no base64: {shown(text)}") from None


def to_json(tensor: OutputTensor) -> list[Any]:
    """Return an output tensor's data for JSON; bytes are base64 where the tensor's content type says so."""
    if tensor.datatype != "BYTES":
        return tensor.values
    if tensor.parameters.get("content_type") == "base64":
        return [base64.b64encode(value).decode() for value in tensor.values]
    return [value.decode() for value in tensor.values]


def to_bytes(tensor: OutputTensor) -> bytes:
    """Return an output tensor's data in binary form."""
    if tensor.datatype == "BYTES":
        return b"".join(LENGTH.pack(len(value)) + value for value in tensor.values)
    return np.array(tensor.values, DATATYPES[tensor.datatype].newbyteorder("<")).tobytes()


def nested(flat: list[Any], shape: Sequence[int]) -> list[Any]:
    """Nest a flat list as the shape says."""
    for size in reversed(shape[1:]):
        flat = [flat[i : i + size] for i in range(0, len(flat), size)]
    return flat


def _kinds(datatype: str) -> set[type]:
    """Return what JSON's values of a datatype are in Python: true is no number, and 3.0 no whole one."""
    if datatype in ("BYTES", "BOOL"):
        return {str} if datatype == "BYTES" else {bool}
    return {int} if "INT" in datatype else {int, float}


def _flattened(data: list[Any]) -> tuple[list[Any], list[int]]:
    """Return nested lists as one, and how they were nested."""
    flat, dims = data, [len(data)]
    while list in (kinds := set(map(type, flat))):
        sizes = set(map(len, flat)) if kinds == {list} else set()
        if len(sizes) != 1:
            raise DataError("the data is nested unevenly")
        dims.append(sizes.pop())
        flat = list(chain.from_iterable(flat))
    return flat, dims


def _check_nesting(shape: Sequence[int], dims: list[int], count: int) -> None:
    """Refuse data that has another number of values than the shape, or nested otherwise than it, ones left aside."""
    if count != math.prod(shape):
        raise DataError(f"shape {list(shape)} asks for {math.prod(shape)} values, there are {count}")
    wanted, given = ([size for size in sizes if size != 1] for sizes in (shape, dims))
    if given[:-1] != wanted[: max(len(given) - 1, 0)]:  # the last list may hold what is left, flat
        raise DataError(f"the data is nested as {dims}, the shape says {list(shape)}")


def _converted(datatype: str, flat: list[Any]) -> np.ndarray:
    dtype = DATATYPES[datatype]
    if dtype.kind in "iu" and flat:
        limits = np.iinfo(dtype)
        if min(flat) < limits.min or max(flat) > limits.max:
            at = next(i for i, value in enumerate(flat) if not limits.min <= value <= limits.max)
            raise DataError(f"value {at} is {shown(flat[at])}; {datatype} holds {limits.min} to {limits.max}")
    try:
        with np.errstate(over="ignore"):
            array = np.array(flat, np.float64 if dtype.kind == "f" else dtype).astype(dtype)
    except OverflowError:
        raise DataError(f"a value is beyond {datatype}") from None
    if dtype.kind == "f":
        _refuse(~np.isfinite(array), f"is beyond {datatype}")
    return array


def _refuse(wrong: np.ndarray, said: str) -> None:
    if wrong.any():
        raise DataError(f"value {int(wrong.argmax())} {said}")


def _elements(raw: memoryview, count: int) -> list[Any]:
    found: list[bytes] = []
    at = 0
    while at < len(raw):
        if at + LENGTH.size > len(raw) or (end := at + LENGTH.size + LENGTH.unpack_from(raw, at)[0]) > len(raw):
            raise DataError(f"element {len(found)} of the BYTES is cut short")
        found.append(bytes(raw[at + LENGTH.size : end]))
        at = end
    if len(found) != count:
        raise DataError(f"the shape asks for {count} elements, there are {len(found)}")
    return found
