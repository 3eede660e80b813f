"""/openapi.json: whole, valid, and true to what the parsers take."""

from __future__ import annotations

import asyncio
import copy
import json
from typing import Any

import httpx
import jsonschema
import pytest
from fastapi.routing import APIRoute

from serve.api import inference_api, routes
from serve.api.body import ApiError
from serve.api.embeddings import parse as parse_embeddings
from serve.api.gateway import Gateway
from serve.api.openai_api import parse_chat, parse_completion
from serve.api.openapi.document import OPERATIONS, document
from serve.api.responses.parse import parse as parse_responses
from tests.support.responses import FULL, JUNK, changed, places

APP = routes.build(lambda: None)  # type: ignore[arg-type, return-value]
ROUTES = [
    (method.lower(), route.path)
    for route in APP.routes
    if isinstance(route, APIRoute)
    for method in route.methods - {"HEAD"}
]
DOCUMENT = document(ROUTES)
SCHEMAS = DOCUMENT["components"]["schemas"]
CHAT: dict[str, Any] = {
    "model": "m",
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "hello"}]},
        {"role": "assistant", "tool_calls": [{"id": "x", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "x", "content": "4"},
    ],
    "max_tokens": 3,
    "top_p": 0.5,
    "stop": ["x"],
    "seed": 1,
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}},
    "store": True,
    "best_of": 1,
    "reasoning_effort": "none",
    "web_search_options": None,
}
COMPLETION = {"model": "m", "prompt": ["a", "b"], "max_tokens": 2, "logit_bias": {"3": 1.0}, "echo": True}
EMBEDDINGS = {"model": "m", "input": [[1, 2], [3]], "encoding_format": "float", "truncate": "NONE"}
INFER = {
    "id": "1",
    "inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1.0, 2.0], "parameters": {}}],
    "outputs": [{"name": "y"}],
}


def valid(name: str, body: Any) -> bool:
    whole = {"$ref": f"#/components/schemas/{name}", "components": {"schemas": SCHEMAS}}
    return bool(jsonschema.Draft202012Validator(whole).is_valid(body))


def test_every_route_is_told_and_every_reference_leads_somewhere() -> None:
    told = {(method, path) for path, methods in DOCUMENT["paths"].items() for method in methods}
    assert told == {(method, path.replace(":path", "")) for method, path in ROUTES}
    assert set(OPERATIONS) <= told
    names = [each["operationId"] for methods in DOCUMENT["paths"].values() for each in methods.values()]
    assert len(names) == len(set(names))

    def references(value: Any) -> list[str]:
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        own = [value["$ref"]] if isinstance(value, dict) and isinstance(value.get("$ref"), str) else []
        return own + [found for each in inside for found in references(each)]

    for reference in set(references(DOCUMENT)):
        here: Any = DOCUMENT
        for part in reference.removeprefix("#/").split("/"):
            here = here[part]
    for schema in SCHEMAS.values():
        jsonschema.Draft202012Validator.check_schema(schema)


READ: list[tuple[str, Any, dict[str, Any]]] = [
    ("ChatRequest", parse_chat, CHAT),
    ("CompletionRequest", parse_completion, COMPLETION),
    ("EmbeddingsRequest", parse_embeddings, EMBEDDINGS),
    ("ResponsesRequest", parse_responses, FULL),
]


@pytest.mark.parametrize(("name", "parse", "body"), READ, ids=[name for name, _, _ in READ])
def test_what_is_taken_is_described(name: str, parse: Any, body: dict[str, Any]) -> None:
    assert valid(name, body)
    parse(copy.deepcopy(body), "1")
    junk = [changed(path, each, body) for path in places(body) for each in JUNK]
    junk += [{**body, "unknown": each} for each in JUNK]
    taken = 0
    for each in junk:
        try:
            parse(copy.deepcopy(each), "1")
        except ApiError:
            continue
        taken += 1
        assert valid(name, each), each
    assert taken > 10


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("ChatRequest", {**CHAT, "messages": []}),
        ("ChatRequest", {**CHAT, "best_of": 2}),
        ("ChatRequest", {**CHAT, "web_search_options": {}}),
        ("ChatRequest", {**CHAT, "unknown": 1}),
        ("ChatRequest", {"model": "m"}),
        ("ResponsesRequest", {**FULL, "store": True}),
        ("ResponsesRequest", {**FULL, "previous_response_id": "resp_1"}),
        ("ResponsesRequest", {**FULL, "input": []}),
        ("ResponsesRequest", {**FULL, "tools": [{"type": "web_search"}]}),
        ("EmbeddingsRequest", {**EMBEDDINGS, "input": []}),
        ("RequestBody", {"inputs": []}),
    ],
)
def test_what_is_refused_is_not_described(name: str, body: dict[str, Any]) -> None:
    assert not valid(name, body)


def test_tensors_are_described() -> None:
    assert valid("RequestBody", INFER)
    assert inference_api.parse(json.dumps(INFER).encode()).inputs["x"].shape == (1, 2)


def test_it_is_served() -> None:
    gateway = Gateway(None, max_body_bytes=1, max_prompts=1)  # type: ignore[arg-type]

    async def fetched() -> httpx.Response:
        transport = httpx.ASGITransport(routes.build(lambda: gateway))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get("/openapi.json")

    assert asyncio.run(fetched()).json() == DOCUMENT
