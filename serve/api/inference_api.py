"""The Open Inference Protocol (v2): a request's JSON and binary tensors in, predictions as tensors out.

Pure functions; what depends on the model is checked in the replica (serve/engines/inputs.py). Binary tensors follow
the protocol's extension `binary_tensor_data`: their bytes stand behind the JSON, in its order, and the header
Inference-Header-Content-Length says where the JSON ends. A parameter that is not known is refused, not ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, model_validator

from serve.api import mistakes, tensor_data
from serve.api.body import ApiError, parse_json, shown
from serve.api.openai_requests import first_unknown
from serve.api.tensor_data import DataError
from serve.tensors import DATATYPES, OutputTensor, output

EXTENSIONS = ("binary_tensor_data",)
LENGTH_HEADER = "inference-header-content-length"
NEUTRAL = ("priority", "timeout", "headers")
"""Parameters of a request that other servers have and that change no answer."""
OFF = {
    "sequence_id": (0, ""),
    "sequence_start": (False,),
    "sequence_end": (False,),
    "classification": (0,),
    "triton_enable_empty_final_response": (False,),
}
"""Parameters of other servers' that are not supported → the values that ask for nothing."""


class _Known(BaseModel):
    """A part of a request that has no unknown names."""

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _first_unknown(cls, value: Any) -> Any:
        return first_unknown(cls, value) if isinstance(value, dict) else value


class NamedPart(_Known):
    """An output that is asked for, by its name."""

    name: Annotated[str, Field(min_length=1)]
    parameters: dict[str, Any] | None = None


class InputTensor(NamedPart):
    """A tensor that is sent: in `data`, or in binary form behind the JSON."""

    shape: Annotated[list[Annotated[int, Field(ge=1, lt=2**31)]], Field(min_length=1, max_length=32), FailFast()]
    datatype: Literal[tuple([*DATATYPES, "BYTES"])]  # type: ignore[valid-type]
    data: list[Any] | None = None


class RequestBody(_Known):
    """The JSON of a request for predictions."""

    id: str | None = None
    model_name: str | None = None
    model_version: str | None = None
    inputs: Annotated[list[InputTensor], Field(min_length=1), FailFast()]
    outputs: Annotated[list[NamedPart] | None, FailFast()] = None
    parameters: dict[str, Any] | None = None


@dataclass(frozen=True)
class InferRequest:
    """A parsed request."""

    id: str | None
    inputs: dict[str, Any]
    """Arrays, or lists of str or bytes; the first axis is the batch."""
    outputs: dict[str, bool] | None
    """The outputs asked for, and whether in binary form; None: all, as `binary` says."""
    binary: bool = False


@dataclass(frozen=True)
class InferAnswer:
    """An answer's body, and the headers that say how to read it."""

    content: bytes
    headers: dict[str, str]


def parse(raw: bytes, header_length: str | None = None, *, model: str = "", version: str = "") -> InferRequest:
    """Read a request: JSON, or JSON of `header_length` bytes with binary tensors behind it.

    Args:
        model: what the path names, as which the body's `model_name` and `model_version` must name it too.

    Raises:
        ApiError: 400, with what is wrong and where.
    """
    head, tail = _split(raw, header_length)
    request = _validate(parse_json(head))
    _same("model_name", request.model_name, model)
    _same("model_version", request.model_version, version)
    parameters = _parameters("parameters", request.parameters, ("binary_data_output", "content_type", *NEUTRAL))
    _content_type("parameters", parameters, ("np", "str"))
    binary = _flag("parameters", parameters, "binary_data_output") or False
    return InferRequest(request.id, _inputs(request.inputs, tail), _outputs(request.outputs or [], binary), binary)


def parse_index(raw: bytes) -> bool:
    """Read what a listing of the models may be asked: whether only those that are ready are wanted. Raises ApiError."""
    body = parse_json(raw) if raw.strip() else {}
    ready = body.pop("ready", None)
    for name in body:
        raise _bad(name, "is not known here; known: ready")
    if not isinstance(ready, bool | None):
        raise _bad("ready", f"must be true or false (given: {shown(ready)})")
    return bool(ready)


def answer(model: str, version: str, request: InferRequest, predictions: list[dict[str, Any]]) -> InferAnswer:
    """Return the answer: an output tensor for each field of the predictions, or for those asked for.

    Raises:
        ApiError: there is no output of a name that was asked for.
    """
    known = {name: output(name, [each[name] for each in predictions]) for name in predictions[0]}
    wanted = dict.fromkeys(known, request.binary) if request.outputs is None else request.outputs
    for name in wanted:
        if name not in known:
            raise ApiError(400, f"there is no output {name!r}; known: {', '.join(known)}", param="outputs")
    told = [_told(known[name], binary) for name, binary in wanted.items()]
    body = {"model_name": model, "model_version": version, "outputs": [tensor for tensor, _ in told]}
    head = json.dumps(body if request.id is None else {**body, "id": request.id}, allow_nan=False).encode()
    if not any(wanted.values()):
        return InferAnswer(head, {"content-type": "application/json"})
    headers = {"content-type": "application/octet-stream", LENGTH_HEADER: str(len(head))}
    return InferAnswer(head + b"".join(data for _, data in told), headers)


def _split(raw: bytes, header_length: str | None) -> tuple[bytes, memoryview]:
    if header_length is None:
        return raw, memoryview(b"")
    digits = header_length.isascii() and header_length.isdigit() and len(header_length) < 20
    if not digits or not 0 < int(header_length) <= len(raw):
        message = f"Inference-Header-Content-Length is {header_length!r:.40}: it is the length of the JSON in front, "
        raise ApiError(400, f"{message}from 1 to the body's {len(raw)} bytes", code="invalid_value")
    return raw[: int(header_length)], memoryview(raw)[int(header_length) :]


def _validate(body: dict[str, Any]) -> RequestBody:
    try:
        return RequestBody.model_validate(body)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in detail["loc"]).lstrip(".")
        raise _bad(param, mistakes.sentence([detail])) from None


def _inputs(parts: list[InputTensor], tail: memoryview) -> dict[str, Any]:
    inputs: dict[str, Any] = {}
    at = 0
    for index, part in enumerate(parts):
        where = f"inputs[{index}]"
        if part.name in inputs:
            raise _bad(where, f"the input {part.name!r} is given twice")
        parameters = _parameters(f"{where}.parameters", part.parameters, ("content_type", "binary_data_size"))
        size = _size(where, part, parameters)
        if at + (size or 0) > len(tail):
            hint = "is the header Inference-Header-Content-Length set?"
            raise _bad(where, f"binary_data_size is {size}, {len(tail) - at} bytes are left behind the JSON; {hint}")
        try:
            inputs[part.name] = _value(part, parameters, tail[at : at + size] if size is not None else None)
        except DataError as error:
            raise _bad(where, f"input {part.name!r}: {error}") from None
        at += size or 0
    if at != len(tail):
        raise _bad("inputs", f"{len(tail)} bytes stand behind the JSON, the inputs' binary_data_size name {at}")
    return inputs


def _size(where: str, part: InputTensor, parameters: Mapping[str, Any]) -> int | None:
    """Return how many of the bytes behind the JSON are the input's; None where it has `data`."""
    size = parameters.get("binary_data_size")
    if (size is None) == (part.data is None):
        raise _bad(where, "a tensor has either `data` or, in binary form, the parameter binary_data_size")
    if size is not None and (type(size) is not int or size < 0):
        raise _bad(f"{where}.parameters.binary_data_size", f"must be a number of bytes (given: {shown(size)})")
    return size


def _value(part: InputTensor, parameters: Mapping[str, Any], raw: memoryview | None) -> Any:
    kinds = ("str", "base64") if part.datatype == "BYTES" else ("np",)
    content_type = _content_type(f"input {part.name!r}", parameters, kinds)
    if raw is not None:
        value = tensor_data.from_bytes(part.datatype, part.shape, raw)
    else:
        value = tensor_data.from_json(part.datatype, part.shape, part.data or [])
    return tensor_data.decoded(value) if content_type == "base64" else value


def _outputs(parts: list[NamedPart], binary: bool) -> dict[str, bool] | None:
    outputs: dict[str, bool] = {}
    for index, part in enumerate(parts):
        if part.name in outputs:
            raise _bad(f"outputs[{index}]", f"the output {part.name!r} is asked for twice")
        where = f"outputs[{index}].parameters"
        own = _flag(where, _parameters(where, part.parameters, ("binary_data",)), "binary_data")
        outputs[part.name] = binary if own is None else own
    return outputs or None


def _told(tensor: OutputTensor, binary: bool) -> tuple[dict[str, Any], bytes]:
    """Return an output tensor as JSON, and the bytes that follow it."""
    part: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape}
    if not binary:
        parameters = {"parameters": tensor.parameters} if tensor.parameters else {}
        return {**part, **parameters, "data": tensor_data.to_json(tensor)}, b""
    data = tensor_data.to_bytes(tensor)
    kept = {key: value for key, value in tensor.parameters.items() if value != "base64"}
    return {**part, "parameters": {**kept, "binary_data_size": len(data)}}, data


def _parameters(where: str, given: dict[str, Any] | None, known: tuple[str, ...]) -> dict[str, Any]:
    """Return the parameters that are set. One that is not known could mean anything, so it is refused."""
    kept = {key: value for key, value in (given or {}).items() if value is not None and not _is_off(key, value)}
    for key in kept:
        if key not in known:
            raise _bad(f"{where}.{key}", f"this parameter is not supported; known here: {', '.join(known)}")
    return kept


def _is_off(key: str, value: Any) -> bool:
    return any(type(value) is type(off) and value == off for off in OFF.get(key, ()))


def _flag(where: str, parameters: Mapping[str, Any], name: str) -> bool | None:
    value = parameters.get(name)
    if value is None or isinstance(value, bool):
        return value
    raise _bad(f"{where}.{name}", f"must be true or false (given: {shown(value)})")


def _content_type(where: str, parameters: Mapping[str, Any], known: tuple[str, ...]) -> str | None:
    value = parameters.get("content_type")
    if value is None or value in known:
        return value
    raise _bad(where, f"content_type {shown(value)} is not supported here; known: {', '.join(known)}")


def _same(key: str, given: str | None, wanted: str) -> None:
    if given and wanted and given != wanted:
        raise _bad(key, f"the body says {given!r} and the path {wanted!r}")


def _bad(where: str, message: str) -> ApiError:
    return ApiError(400, f"{where}: {message}", code="invalid_value", param=where)
