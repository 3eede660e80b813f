"""JSON bodies in, and errors out in OpenAI's shape: what every route of the gateway shares."""

from __future__ import annotations

import json
import math
from typing import Any


class ApiError(Exception):
    """An answer that is an error, in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        kind = {429: "rate_limit_error"}.get(self.status, "invalid_request_error")
        if self.status >= 500:
            kind = "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def parse_json(raw: bytes) -> dict[str, Any]:
    """Read a body as a JSON object. NaN, Infinity and numbers beyond a double are refused (json accepts them)."""
    try:
        value = json.loads(raw, parse_constant=_no_constant, parse_float=_finite)
        if b"\\u" in raw:
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text a tokenizer can take
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body must be a JSON object, not {type(value).__name__}", code="invalid_json")
    return value


def model_name(body: dict[str, Any]) -> str:
    """Return the name under `model`, checked before the rest: an unknown model is a 404 whatever else is wrong."""
    name = body.get("model")
    if not isinstance(name, str) or not name:
        raise ApiError(400, "model is required and must be a string", param="model", code="invalid_value")
    return name


def model_not_found(name: str, known: list[str]) -> ApiError:
    """Return the 404 for a model that is not served, naming those that are."""
    message = f"the model {name!r} does not exist here; served: {', '.join(sorted(known)) or 'none'}"
    return ApiError(404, message, code="model_not_found", param="model")


def shown(value: Any) -> str:
    """Return a value as JSON, short enough for a message."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not a JSON value")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is out of range")
    return value
