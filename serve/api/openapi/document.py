"""The OpenAPI document: every route, with what it takes and what it answers. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from serve.api.callers import OPEN_PATHS
from serve.api.inference_api import LENGTH_HEADER
from serve.api.openapi import answers, bodies
from serve.api.openapi.bodies import reference

VERSION = "3.1.0"
INFERENCE = "/v2"
"""Errors of paths below it have the Open Inference Protocol's shape."""


@dataclass(frozen=True)
class Operation:
    """What a route does."""

    summary: str
    answer: str
    """The schema of its answer."""
    body: str | None = None
    """The schema of its body."""
    needs_body: bool = True
    is_form: bool = False
    """Whether the body is a form, and the answer may be plain text."""
    streams: bool = False
    """Whether it can answer with server-sent events."""
    unready: str | None = None
    """The schema of its answer while models are not ready, where that is no error."""


OPERATIONS: dict[tuple[str, str], Operation] = {
    ("post", "/v1/chat/completions"): Operation("Answer a conversation", "ChatCompletion", "ChatRequest", streams=True),
    ("post", "/v1/completions"): Operation("Go on with a text", "Completion", "CompletionRequest", streams=True),
    ("post", "/v1/responses"): Operation("Answer input items", "Response", "ResponsesRequest", streams=True),
    ("post", "/v1/embeddings"): Operation("Make vectors of texts", "Embeddings", "EmbeddingsRequest"),
    ("post", "/v1/audio/transcriptions"): Operation(
        "Write down what is said in a recording", "Transcription", "TranscriptionRequest", is_form=True
    ),
    ("get", "/v1/models"): Operation("List the models", "Models"),
    ("get", "/v1/models/{name}"): Operation("Describe a model", "Model"),
    ("get", "/v2"): Operation("Describe the server", "Server"),
    ("get", "/v2/health/live"): Operation("Say whether the server runs", "Live"),
    ("get", "/v2/health/ready"): Operation("Say whether every model is ready", "Ready", unready="Ready"),
    ("post", "/v2/repository/index"): Operation("List the models", "Index", "IndexRequest", needs_body=False),
    **{
        ("post", f"/v2/models/{{name}}{version}/infer"): Operation("Predict", "Predictions", "RequestBody")
        for version in ("", "/versions/{version}")
    },
    **{
        ("get", f"/v2/models/{{name}}{version}/ready"): Operation(
            "Say whether a model is ready", "ModelReady", unready="ModelReady"
        )
        for version in ("", "/versions/{version}")
    },
    **{
        ("get", f"/v2/models/{{name}}{version}"): Operation("Describe a model's tensors", "ModelMetadata")
        for version in ("", "/versions/{version}")
    },
    ("get", "/health"): Operation("Say whether every model is ready", "Health", unready="Starting"),
    ("get", "/status"): Operation("Tell how busy every model is", "Status"),
}
ERRORS = {
    "400": "the request is at fault; `param` names what to change",
    "401": "a key is needed",
    "403": "the key may not do this, or a page of this origin may not ask",
    "404": "there is no such model or version here",
    "408": "the request did not come to its end, or its time was over; see Retry-After",
    "413": "the body is too large",
    "414": "the URL is too long",
    "415": "the body's coding is not read",
    "429": "a limit of the key is reached, its budget is spent, or the model is busy; see Retry-After",
    "431": "the headers are too many or too long",
    "500": "the server failed; its log has the reason under the id that is told",
    "503": "no replica is ready, or keys cannot be checked now",
}
OF_READING = ("400", "401", "403", "404", "408", "414", "431", "500", "503")
"""Errors of routes without a body."""


def document(routes: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Return the document.

    Args:
        routes: method in small letters and path, as the app has them; one that OPERATIONS does not know is told by
            its path alone.
    """
    paths: dict[str, dict[str, Any]] = {}
    for method, path in routes:
        plain = re.sub(r"\{(\w+):path\}", r"{\1}", path)
        paths.setdefault(plain, {})[method] = _operation(method, plain)
    return {
        "openapi": VERSION,
        "info": {"title": "Tandem", "version": "1"},
        "paths": paths,
        "components": {
            "schemas": {**bodies.schemas(), **answers.schemas()},
            "responses": {f"{kind}{status}": _error(status, kind) for status in ERRORS for kind in _KINDS},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


_KINDS = ("Error", "InferenceError")


def _operation(method: str, path: str) -> dict[str, Any]:
    known = OPERATIONS.get((method, path))
    name = re.sub(r"\W+", "_", f"{method}{path}").strip("_")
    told: dict[str, Any] = {"operationId": name, "security": [] if path in OPEN_PATHS else [{}, {"key": []}]}
    if parameters := [_parameter(each) for each in re.findall(r"\{(\w+)\}", path)]:
        told["parameters"] = parameters
    if known is None:
        return {**told, "responses": {"200": {"description": "the answer"}, "default": {"description": "an error"}}}
    told["summary"] = known.summary
    if known.body:
        told["requestBody"] = {"required": known.needs_body, "content": _content(known.body)}
        if known.is_form:
            told["requestBody"]["content"] = {"multipart/form-data": {"schema": reference(known.body)}}
    if path.endswith("/infer"):
        told["parameters"] = [*told["parameters"], _length_header()]
    return {**told, "responses": _responses(known, path)}


def _parameter(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}


def _length_header() -> dict[str, Any]:
    told = "how many bytes the JSON has, where binary tensors stand behind it"
    schema = {"type": "integer", "minimum": 1}
    return {"name": LENGTH_HEADER, "in": "header", "required": False, "schema": schema, "description": told}


def _responses(known: Operation, path: str) -> dict[str, Any]:
    kind = "InferenceError" if path == INFERENCE or path.startswith(f"{INFERENCE}/") else "Error"
    statuses = ERRORS if known.body else OF_READING
    responses: dict[str, Any] = {status: {"$ref": f"#/components/responses/{kind}{status}"} for status in statuses}
    if known.unready:
        responses["503"] = {"description": "not ready", "content": _content(known.unready)}
    content = _content(known.answer)
    if known.streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    if known.is_form:
        content["text/plain"] = {"schema": {"type": "string"}}
    if path.endswith("/infer"):
        content["application/octet-stream"] = {"schema": {"type": "string", "format": "binary"}}
    return {"200": {"description": "the answer", "content": content}, **responses}


def _content(schema: str) -> dict[str, Any]:
    return {"application/json": {"schema": reference(schema)}}


def _error(status: str, kind: str) -> dict[str, Any]:
    return {"description": ERRORS[status], "content": _content(kind)}
