"""Bodies that would keep a gateway busy: how many parts they may have, and that their first mistake is all that is
looked for."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from serve.api import aside, embeddings, openai_api, strict_json
from serve.api.body import ApiError, parse_json, shown
from serve.api.inference_api import InputTensor, RequestBody
from serve.api.openai_requests import MOST_MESSAGES, ChatRequest, is_empty
from serve.api.responses.parse import parse
from serve.api.responses.requests import ResponsesRequest

MESSAGE = {"role": "user", "content": "x"}
BAD = [{"role": 1}] * 3


@pytest.mark.parametrize(("unit", "name"), [("{}", "objects"), ("[]", "lists")])
def test_parts_are_counted_before_any_is_made(unit: str, name: str) -> None:
    most = {each: most for most, each in strict_json.MOST_OF.values()}[name]
    head, tail = ("", "") if name == "lists" else ("[", "]")
    count = most - (name == "lists")  # the outer list counts
    assert len(strict_json.read(f"[{','.join([unit] * count)}]")) == count
    with pytest.raises(ValueError, match=f"^it has more than {most} {name}$"):
        strict_json.read(f"[{head}{','.join([unit] * most)},{unit}{tail}]")


def test_names_are_counted() -> None:
    most = strict_json.MOST_OF[":"][0]
    body = b"{" + b",".join(b'"%d":1' % i for i in range(most + 1)) + b"}"
    with pytest.raises(ApiError, match=f"^the body is not valid JSON: it has more than {most} names$") as refused:
        parse_json(body)
    assert refused.value.status == 400


@pytest.mark.parametrize("text", ["{" * 60_000, "[" * 600_000, '\\"{:' * 300_000, "\\\\", '\\\\\\"' + "{" * 60_000])
def test_what_stands_in_strings_is_not_counted(text: str) -> None:
    assert strict_json.read(f'["{text}", "{{"]') == [json.loads(f'"{text}"'), "{"]


def test_long_lists_of_numbers_are_read() -> None:
    ids = list(range(600_000))
    read = parse_json(json.dumps({"model": "m", "prompt": ids, "input": ids}).encode())
    assert openai_api.parse_completion({"model": "m", "prompt": read["prompt"]}, "x").calls[0].prompt == tuple(ids)
    assert embeddings.parse({"model": "m", "input": read["input"]}, "x").call.inputs == (tuple(ids),)


CHAT = {"model": "m", "messages": [MESSAGE]}
CALLS = {"role": "assistant", "tool_calls": [{}, {}]}
RESPONSES = {"model": "m", "input": "x"}


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (ChatRequest, {**CHAT, "messages": BAD}),
        (ChatRequest, {**CHAT, "messages": [CALLS]}),
        (ChatRequest, {**CHAT, "stop_token_ids": ["a"] * 3}),
        (ChatRequest, {**CHAT, "tools": [1, 2]}),
        (ChatRequest, {**CHAT, "logit_bias": {"1": 0.5, "2": "a", "3": "b"}}),
        (ChatRequest, {**CHAT, "a": 1, "b": 1}),
        (ResponsesRequest, {**RESPONSES, "include": ["a", "b"]}),
        (ResponsesRequest, {**RESPONSES, "metadata": {str(i): i for i in range(17)}}),
        (InputTensor, {"name": "a", "shape": [1], "datatype": "FP32", "b": 1, "c": 1}),
        (RequestBody, {"inputs": [{"name": "a", "shape": [1], "datatype": "FP32"}], "b": 1, "c": 1}),
    ],
)
def test_the_first_mistake_ends_it(kind: type[BaseModel], body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as refused:
        kind.model_validate(body)
    assert refused.value.error_count() == (2 if body.get("messages") == [CALLS] else 1)  # of one call: id, function


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"messages": [MESSAGE] * (MOST_MESSAGES + 1)}, "messages: must be a list of at most 10000 items (given: "),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * (MOST_MESSAGES + 1)}]},
            "messages[0].content: must be a string or a list of at most 10000 items (given: ",
        ),
    ],
)
def test_lists_have_bounds(body: dict[str, Any], message: str) -> None:
    with pytest.raises(ApiError) as refused:
        openai_api.parse_chat({"model": "m", **body}, "x")
    assert refused.value.message.startswith(message)
    with pytest.raises(ApiError, match=r"^input: must be a list of at most 10000 items \(given: 10001\)$"):
        parse({"model": "m", "input": [MESSAGE] * (MOST_MESSAGES + 1)}, "x")


def test_an_object_of_many_empty_values_is_not_empty() -> None:
    assert is_empty({"a": {"b": None}})
    assert not is_empty(dict.fromkeys(map(str, range(101))))


def test_no_more_of_a_value_is_read_than_is_shown() -> None:
    class Long(list[int]):
        def __iter__(self) -> Iterator[int]:
            yield from range(100)
            raise AssertionError("read on")

    assert shown(Long([1])) == json.dumps(list(range(100)))[:77] + "..."
    assert shown({"a": "é" * 10}) == '{"a": "éééééééééé"}'


def test_large_bodies_are_parsed_beside_the_loop() -> None:
    async def scenario() -> None:
        assert await aside.parsed(aside.LARGE, threading.get_ident) == threading.get_ident()
        assert await aside.parsed(aside.LARGE + 1, threading.get_ident) != threading.get_ident()

    asyncio.run(scenario())
