"""The Open Inference Protocol (v2): tensors in JSON to numpy and back. Pure functions; the model's own checks are in
the replica.

An image may also be sent as a file: datatype BYTES with `"parameters": {"content_type": "base64"}` (MLServer's way).
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serve.api.body import ApiError, shown

DATATYPES = {
    "BOOL": np.bool_,
    **{f"{sign}INT{bits}": np.dtype(f"{sign.lower()}int{bits}") for sign in ("", "U") for bits in (8, 16, 32, 64)},
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
}
Tensor = dict[str, Any]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    name: str
    parameters: dict[str, Any] = {}


class _Input(_Part):
    shape: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    datatype: Literal[tuple([*DATATYPES, "BYTES"])]  # type: ignore[valid-type]
    data: list[Any]


class _Request(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    id: str | None = None
    inputs: Annotated[list[_Input], Field(min_length=1)]
    outputs: list[_Part] | None = None
    parameters: dict[str, Any] = {}


class InferRequest:
    """A parsed request: named inputs (arrays, or lists of str or bytes) and the outputs asked for (None: all)."""

    def __init__(self, body: dict[str, Any]) -> None:
        request = _validate(body)
        self.id = request.id
        self.inputs = {part.name: _array(part) for part in request.inputs}
        self.outputs = [part.name for part in request.outputs] if request.outputs else None
        if len({len(value) for value in self.inputs.values()}) > 1:
            raise ApiError(400, "the first dimension of all inputs must be the same batch size", param="inputs")


def response(model: str, version: str, request: InferRequest, predictions: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the answer: one output tensor for each field of the predictions."""
    outputs = [tensor(name, [answer[name] for answer in predictions]) for name in predictions[0]]
    if request.outputs is not None:
        outputs = _chosen(outputs, request.outputs)
    body = {"model_name": model, "model_version": version, "outputs": outputs}
    return body if request.id is None else {**body, "id": request.id}


def tensor(name: str, values: list[Any]) -> Tensor:
    """Return one field of B predictions as a tensor [B], or [B, labels] where it maps labels to numbers."""
    first = values[0]
    if isinstance(first, dict):
        labels = list(first)
        data = [float(value[label]) for value in values for label in labels]
        shape = [len(values), len(labels)]
        return {"name": name, "datatype": "FP32", "shape": shape, "parameters": {"labels": labels}, "data": data}
    if isinstance(first, (int, float)) and not isinstance(first, bool):
        datatype = "INT64" if all(isinstance(value, int) for value in values) else "FP32"
        return {"name": name, "datatype": datatype, "shape": [len(values)], "data": values}
    texts = [value if isinstance(value, str) else json.dumps(value) for value in values]
    return {"name": name, "datatype": "BYTES", "shape": [len(values)], "data": texts}


def _validate(body: dict[str, Any]) -> _Request:
    try:
        return _Request.model_validate(body)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in detail["loc"]).lstrip(".")
        message = f"{param}: {detail['msg']} (given: {shown(detail.get('input'))})"
        raise ApiError(400, message, code="invalid_value", param=param) from None


def _array(part: _Input) -> Any:
    if part.shape[0] == 0:
        raise _bad(part, "the first dimension of the shape is the batch size and must be at least 1")
    if part.datatype == "BYTES":
        return _texts(part)
    try:
        given = np.array(part.data)
        array = given.astype(DATATYPES[part.datatype])
    except (ValueError, TypeError, OverflowError):
        raise _bad(part, f"the data must be numbers of type {part.datatype}, flat or nested evenly") from None
    _check_values(part, given, array)
    if array.size != math.prod(part.shape):
        raise _bad(part, f"shape {part.shape} asks for {math.prod(part.shape)} values, there are {array.size}")
    return array.reshape(part.shape)


def _check_values(part: _Input, given: np.ndarray, array: np.ndarray) -> None:
    kinds = {"b": "b", "i": "iu", "u": "iu", "f": "iuf"}[array.dtype.kind]
    whole = array.dtype.kind in "iu" and given.dtype.kind in kinds and not np.array_equal(given, array)
    if given.dtype.kind not in kinds or whole or not np.isfinite(array).all():
        raise _bad(part, f"the data must be numbers in the range of {part.datatype}")


def _texts(part: _Input) -> list[str] | list[bytes]:
    texts = list(part.data)
    if not all(isinstance(text, str) for text in texts) or len(texts) != math.prod(part.shape):
        raise _bad(part, f"BYTES data must be a flat list of {math.prod(part.shape)} strings")
    if part.parameters.get("content_type") != "base64":
        return texts
    try:
        return [base64.b64decode(text, validate=True) for text in texts]
    except (binascii.Error, ValueError):
        raise _bad(part, "the data is not valid base64") from None


def _chosen(outputs: list[Tensor], names: list[str]) -> list[Tensor]:
    known = {output["name"]: output for output in outputs}
    for name in names:
        if name not in known:
            raise ApiError(400, f"there is no output {name!r}; known: {', '.join(known)}", param="outputs")
    return [known[name] for name in names]


def _bad(part: _Input, message: str) -> ApiError:
    return ApiError(400, f"input {part.name!r}: {message}", code="invalid_value", param="inputs")
