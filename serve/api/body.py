"""JSON bodies in, and errors out in OpenAI's shape: what every route of the gateway shares."""

from __future__ import annotations

import json
from typing import Any

from serve.api import strict_json

_encoder = json.JSONEncoder(ensure_ascii=False, default=str)


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
        """Return the answer in OpenAI's shape."""
        kind = {429: "rate_limit_error"}.get(self.status, "invalid_request_error")
        if self.status >= 500:
            kind = "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def shaped(path: str, error: ApiError) -> dict[str, Any]:
    """Return an error's body in the shape of the protocol that the path belongs to."""
    inference = path == "/v2" or path.startswith("/v2/")
    return {"error": error.message} if inference else error.body()


def parse_json(raw: bytes) -> dict[str, Any]:
    """Read a body as a JSON object in UTF-8, strictly: serve/api/strict_json.py. Raises ApiError (400)."""
    try:
        value = strict_json.read(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _not_json(f"byte {error.start} is 0x{raw[error.start]:02x}, which is not UTF-8") from None
    except ValueError as error:
        raise _not_json(str(error) if raw.strip() else "it is empty") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body must be a JSON object, not {_kind(value)}", code="invalid_json")
    return value


def check_content_type(content_type: str | None) -> None:
    """Refuse a body that says it is a form, or in another charset than UTF-8: read as UTF-8 it would be another text.

    Other types pass, since what many clients send beside a JSON body is not its type.
    """
    said = (content_type or "").lower()
    if said.startswith("multipart/"):
        raise ApiError(400, f"the body is a form ({said.split(';')[0]}): send JSON", code="invalid_value")
    _, found, charset = said.partition("charset=")
    name = charset.split(";")[0].strip(" \"'")
    if found and name not in ("utf-8", "utf8", "us-ascii", "ascii"):
        raise ApiError(400, f"the charset {name!r:.40} is not read here: send the body in UTF-8", code="invalid_value")


def model_name(body: dict[str, Any]) -> str:
    """Return the name under `model`, checked before the rest: an unknown model is a 404 whatever else is wrong."""
    name = body.get("model")
    if not isinstance(name, str) or not name:
        raise ApiError(400, "model is required and must be a string", param="model", code="invalid_value")
    return name


def model_not_found(name: str, known: list[str]) -> ApiError:
    """Return the 404 for a model that is not served, naming those that are."""
    message = f"the model {name[:100]!r} does not exist here; served: {', '.join(sorted(known)) or 'none'}"
    return ApiError(404, message, code="model_not_found", param="model")


def shown(value: Any) -> str:
    """Return a value as JSON, short enough for a message. No more of it is read than is shown."""
    text = ""
    for piece in _encoder.iterencode(value):
        text += piece
        if len(text) > 80:
            return text[:77] + "..."
    return text


def _not_json(why: str) -> ApiError:
    return ApiError(400, f"the body is not valid JSON: {why}", code="invalid_json")


def _kind(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
