"""Tensors of the Open Inference Protocol in numpy's terms: datatypes, and predictions as output tensors."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

DATATYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    **{f"{sign}INT{bits}": np.dtype(f"{sign.lower()}int{bits}") for sign in ("", "U") for bits in (8, 16, 32, 64)},
    "FP16": np.dtype(np.float16),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
}
"""All of the protocol's but BYTES, which is a list of str or bytes here."""


@dataclass(frozen=True)
class OutputTensor:
    """One field of B predictions."""

    name: str
    datatype: str
    shape: list[int]
    """[B, …]"""
    values: list[Any]
    """Flat, row-major: numbers, or bytes."""
    parameters: dict[str, Any] = field(default_factory=dict)


def datatype_of(dtype: np.dtype[Any]) -> str:
    """Return the protocol's name of a numpy datatype; numpy's own where it has none."""
    return next((name for name, known in DATATYPES.items() if known == dtype), str(dtype))


def output(name: str, values: Sequence[Any]) -> OutputTensor:
    """Return one field of B predictions as a tensor [B, …].

    Labels mapped to numbers become FP32 [B, labels], with the labels in the parameters; lists and arrays of numbers
    keep their shape. What is neither number, text nor bytes is sent as JSON, and the parameter `content_type` says so.
    """
    first = values[0]
    if all(_scores(value) and list(value) == list(first) for value in values):
        flat = [float(value[label]) for value in values for label in first]
        return OutputTensor(name, "FP32", [len(values), len(first)], flat, {"labels": list(first)})
    numbers = _numbers(values)
    if numbers is not None:
        datatype = "FP32" if numbers.dtype == np.float64 and not _deep(first) else datatype_of(numbers.dtype)
        return OutputTensor(name, datatype, list(numbers.shape), numbers.ravel().tolist())
    if isinstance(first, list) and all(isinstance(value, list) and len(value) == len(first) for value in values):
        flat = [each for value in values for each in value]
        if flat and all(isinstance(each, str) for each in flat):
            return OutputTensor(name, "BYTES", [len(values), len(first)], *_texts(flat))
    return OutputTensor(name, "BYTES", [len(values)], *_texts(values))


def described(prediction: dict[str, Any]) -> list[dict[str, Any]]:
    """Describe the output tensors that a prediction becomes, as the protocol's metadata does."""
    tensors = [output(name, [value]) for name, value in prediction.items()]
    return [
        {"name": part.name, "datatype": part.datatype, "shape": [-1, *part.shape[1:]]}
        | ({"parameters": part.parameters} if part.parameters else {})
        for part in tensors
    ]


def _scores(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(_is_number(each) for each in value.values())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def _deep(value: Any) -> bool:
    """Return whether a value says itself that it has 64 bits: Python's floats do not."""
    return isinstance(value, np.ndarray | np.generic) and value.dtype == np.float64


def _numbers(values: Sequence[Any]) -> np.ndarray | None:
    """Return numbers, or even lists of them, as an array [B, …]; None for anything else."""
    if any(isinstance(value, str | bytes | dict) or value is None for value in values):
        return None
    try:
        array = np.array(values)
    except ValueError:  # uneven lists
        return None
    return array if array.dtype in DATATYPES.values() else None


def _texts(values: Sequence[Any]) -> tuple[list[bytes], dict[str, Any]]:
    """Return what is no number as bytes, and the parameters that say what they hold."""
    if all(isinstance(value, str) for value in values):
        return [value.encode() for value in values], {}
    if all(isinstance(value, bytes) for value in values):
        return list(values), {"content_type": "base64"}
    return [json.dumps(_plain(value)).encode() for value in values], {"content_type": "json"}


def _plain(value: Any) -> Any:
    """Turn numpy's values, and bytes, into what JSON has."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value
