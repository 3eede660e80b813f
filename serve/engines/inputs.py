"""What a client sent, against what a model says it takes. Pure functions, run in the replica, which knows the model.

Datatype and shape must be those of the model's metadata. Three things are the same question and pass: whole numbers of
another whole type whose values all fit, dimensions of one left out or added, and files in place of numbers where the
metadata has the content type base64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from serve.tensors import DATATYPES, datatype_of


class InputError(ValueError):
    """Tensors that are not what the model takes."""


def rows(inputs: Mapping[str, Any], wanted: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return one instance per row: the value itself for a single input, a mapping of name to value for several.

    Args:
        inputs: arrays, or lists of str or bytes, whose first axis is the batch.
        wanted: the model's inputs, as its metadata has them.

    Raises:
        InputError: missing, unknown, or of another datatype, shape or range.
    """
    names, several = [part["name"] for part in wanted], len(wanted) > 1
    optional = {part["name"] for part in wanted if (part.get("parameters") or {}).get("optional")}
    if not set(names) - optional <= set(inputs) <= set(names):
        said = ", ".join(f"{name} (optional)" if name in optional else name for name in names)
        raise InputError(f"the inputs must be {said}; given: {', '.join(inputs)}")
    names = [name for name in names if name in inputs]
    fitted = {part["name"]: _fitted(inputs[part["name"]], part) for part in wanted if part["name"] in inputs}
    sizes = {name: len(value) for name, value in fitted.items()}
    if len(set(sizes.values())) > 1:
        raise InputError(f"the first dimension is the batch size and must be the same for all inputs; given: {sizes}")
    if not several:
        return list(fitted[names[0]])
    return [dict(zip(names, row, strict=True)) for row in zip(*fitted.values(), strict=True)]


def blank(wanted: Sequence[Mapping[str, Any]]) -> Any:
    """Return an instance of zeros and one-letter texts, without what may be left out."""
    values = {}
    for part in (part for part in wanted if not (part.get("parameters") or {}).get("optional")):
        shape = [max(size, 1) for size in part["shape"]]
        dtype = DATATYPES.get(part["datatype"])
        values[part["name"]] = np.full(shape, "a", object).tolist() if dtype is None else np.zeros(shape, dtype)
    return rows(values, wanted)[0]


def _fitted(value: Any, part: Mapping[str, Any]) -> Any:
    name, datatype = part["name"], part.get("datatype")
    files = "base64" in (part.get("parameters") or {}).get("content_types", ())
    if isinstance(value, list):
        if datatype == "BYTES":
            return _reshaped(name, value, part)
        if not files:
            raise InputError(f"input {name!r} is BYTES, the model takes {datatype}")
        return _files(name, value)
    given = datatype_of(value.dtype)
    if datatype == "BYTES":
        raise InputError(f"input {name!r} is {given}, the model takes BYTES")
    return _reshaped(name, value if datatype in (None, given) else _cast(name, value, str(datatype)), part)


def _cast(name: str, value: np.ndarray, datatype: str) -> np.ndarray:
    """Bring whole numbers to the model's whole type, if it holds them all."""
    given, dtype = datatype_of(value.dtype), DATATYPES.get(datatype)
    if dtype is None or dtype.kind not in "iu":
        raise InputError(f"input {name!r} is {given}, the model takes {datatype}")
    limits = np.iinfo(dtype)
    if value.dtype.kind not in "iu":
        whole = f"whole numbers from {limits.min} to {limits.max}"
        raise InputError(f"input {name!r} is {given}, the model takes {datatype}: {whole}")
    outside = (value < limits.min) | (value > limits.max)
    if outside.any():
        index = np.unravel_index(int(outside.argmax()), value.shape)
        at = "".join(f"[{i}]" for i in index)
        raise InputError(f"input {name!r}{at} is {value[index]}; {datatype} holds {limits.min} to {limits.max}")
    return value.astype(dtype)


def _files(name: str, value: list[Any]) -> list[bytes]:
    """Return the bytes of one file per row. Text is none: it is never taken for the name of a file."""
    flat = [each for row in value for each in (row if isinstance(row, list) else [row])]
    if len(flat) != len(value) or any(isinstance(each, list) for each in flat):
        raise InputError(f"input {name!r}: files are BYTES of shape [N]: one file for each of the {len(value)} rows")
    for index, each in enumerate(flat):
        if not isinstance(each, bytes):
            hint = '"parameters": {"content_type": "base64"}'
            raise InputError(f"input {name!r}[{index}] is text, {each!r:.40}: send a file as base64, with {hint}")
    return flat


def _reshaped(name: str, value: Any, part: Mapping[str, Any]) -> Any:
    """Return the value in the model's shape, if only dimensions of one are in the way."""
    wanted = part.get("shape")
    given = _shape(value)
    if wanted is None or _fits(given, wanted):
        return value
    kept, missing = _without_ones(given), _without_ones(wanted)
    if not (_fits(given[:1], wanted[:1]) and _fits(kept, missing)):
        raise InputError(f"input {name!r} has the shape {given}, the model takes {list(wanted)}")
    sizes = iter(kept)
    shape = [given[0], *(1 if size == 1 else next(sizes) for size in wanted[1:])]
    array = np.array(value, object) if isinstance(value, list) else value
    return array.reshape(shape).tolist() if isinstance(value, list) else array.reshape(shape)


def _fits(given: Sequence[int], wanted: Sequence[int]) -> bool:
    return len(given) == len(wanted) and all(want in (-1, size) for size, want in zip(given, wanted, strict=True))


def _without_ones(shape: Sequence[int]) -> list[int]:
    """Return the dimensions behind the batch that are not one."""
    return [size for size in shape[1:] if size != 1]


def _shape(value: Any) -> list[int]:
    if isinstance(value, np.ndarray):
        return list(value.shape)
    return [len(value), *_shape(value[0])] if isinstance(value, list) and value else []
