"""Responses requests: what is parsed, what is refused by name, and the events of an answer."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from serve.api.body import ApiError
from serve.api.responses.answer import ResponseForm
from serve.api.responses.output import Output
from serve.api.responses.parse import Wanted, parse
from serve.api.routes import not_found
from serve.wire import CallPiece, Chunk, ScoredToken, Tools

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}}
F = {"type": "function", "name": "f", "description": "does", "parameters": PARAMETERS}
G = {"type": "function", "name": "g", "strict": True}
TOLD_F = {"name": "f", "description": "does", "parameters": PARAMETERS}
TOLD_G = {"name": "g", "description": "", "parameters": {"type": "object", "properties": {}}}
USER = {"role": "user", "content": "hello"}


def wanted(given: Any = "hello", **fields: Any) -> Wanted:
    return parse({"model": "m", "input": given, **fields}, "1")


def refused(given: Any = "hello", **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        wanted(given, **fields)
    assert caught.value.status == 400
    return caught.value


def call(at: str, name: str = "f", arguments: str = '{"a": 1}', **fields: Any) -> dict[str, Any]:
    return {"type": "function_call", "call_id": at, "name": name, "arguments": arguments, **fields}


def result(at: str, output: Any = "4", **fields: Any) -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": at, "output": output, **fields}


def said(text: str, **fields: Any) -> dict[str, Any]:
    content = [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}]
    return {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed", "content": content, **fields}


def told_call(at: str, name: str = "f") -> dict[str, Any]:
    return {"id": at, "type": "function", "function": {"name": name, "arguments": {"a": 1}}}


def tool(at: str, name: str = "f", content: str = "4") -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": at, "name": name}


PARTS = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b", "prompt_cache_breakpoint": {"x": 1}}]
THOUGHT = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}


@pytest.mark.parametrize(
    ("given", "messages", "places"),
    [
        ("hello", [USER], ["input"]),
        ([USER], [USER], ["input[0]"]),
        ([{**USER, "type": "message"}], [USER], ["input[0]"]),
        ([{"role": "user", "content": PARTS}], [{"role": "user", "content": "ab"}], ["input[0]"]),
        ([{"role": "developer", "content": "be"}, USER], [{"role": "system", "content": "be"}, USER], None),
        ([USER, said("a"), said("b")], [USER, *({"role": "assistant", "content": c} for c in "ab")], None),
        (  # one answer of the model is one message: text, two calls; results in the order of the calls
            [USER, said("well"), call("x"), call("y", "g"), result("y"), result("x", PARTS)],
            [
                USER,
                {"role": "assistant", "content": "well", "tool_calls": [told_call("x"), told_call("y", "g")]},
                tool("x", content="ab"),
                tool("y", "g"),
            ],
            ["input[0]", "input[1]", "input[5]", "input[4]"],
        ),
        (  # text after a call belongs to the same answer
            [USER, call("x"), said("so"), result("x")],
            [USER, {"role": "assistant", "content": "so", "tool_calls": [told_call("x")]}, tool("x")],
            ["input[0]", "input[1]", "input[3]"],
        ),
        (  # calls told one by one, and an id that is used again
            [USER, call("x"), result("x"), call("x"), result("x", "5")],
            [
                USER,
                *({"role": "assistant", "content": "", "tool_calls": [told_call("x")]}, tool("x")),
                *({"role": "assistant", "content": "", "tool_calls": [told_call("x")]}, tool("x", content="5")),
            ],
            None,
        ),
        (
            [USER, THOUGHT, said("a"), USER, {"type": "reasoning", "summary": []}, said("b")],
            [
                USER,
                {"role": "assistant", "content": "a", "reasoning_content": "hm"},
                *(USER, {"role": "assistant", "content": "b"}),
            ],
            None,
        ),
    ],
)
def test_items_become_messages(given: Any, messages: list[Any], places: list[str] | None) -> None:
    read = wanted(given)
    assert list(read.generation.calls[0].prompt) == messages
    assert places is None or list(read.conversation.places) == places
    led = wanted(given, instructions="be brief")
    assert list(led.generation.calls[0].prompt) == [{"role": "system", "content": "be brief"}, *messages]
    assert led.conversation.places == ("instructions", *read.conversation.places)


@pytest.mark.parametrize(
    ("given", "param"),
    [
        (None, "input"),
        (3, "input"),
        ([], "input"),
        (["hello"], "input[0]"),
        ([{}], "input[0].type"),
        ([{"type": 3}], "input[0].type"),
        ([{"role": "user"}], "input[0].content"),
        ([{"role": "tool", "content": "x"}], "input[0].role"),
        ([{**USER, "content": 3}], "input[0].content"),
        ([{**USER, "name": "bob"}], "input[0].name"),
        ([{**said("x"), "phase": "commentary"}], "input[0].phase"),
        ([{**USER, "content": ["x"]}], "input[0].content[0]"),
        ([{**USER, "content": [{"type": "text", "text": "x"}]}], "input[0].content[0].type"),
        ([{**USER, "content": [{"type": "input_image", "image_url": "x"}]}], "input[0].content[0].type"),
        ([{**USER, "content": [{"type": "input_file", "file_id": "x"}]}], "input[0].content[0].type"),
        ([{**USER, "content": [{"type": "input_audio", "input_audio": {}}]}], "input[0].content[0].type"),
        ([{"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}], "input[0].content[0].type"),
        ([{**USER, "content": [{"type": "input_text"}]}], "input[0].content[0].text"),
        (
            [{"role": "assistant", "content": [{"type": "output_text", "text": "x", "annotations": [{"a": 1}]}]}],
            "input[0].content[0].annotations",
        ),
        ([USER, {"type": "item_reference", "id": "msg_1"}], "input[1].type"),
        ([USER, {"id": "msg_1"}], "input[1].type"),
        ([USER, {"type": "computer_call", "id": "x"}], "input[1].type"),
        ([USER, {"type": "web_search_call", "id": "x"}], "input[1].type"),
        ([{**THOUGHT, "encrypted_content": "gAAA"}, said("x")], "input[0].encrypted_content"),
        ([{"type": "reasoning", "summary": [{"type": "summary_text", "text": "x"}]}], "input[0].summary"),
        ([THOUGHT, USER], "input[0]"),
        ([USER, THOUGHT], "input[1]"),
        ([USER, call("x", arguments="{")], "input[1].arguments"),
        ([USER, call("x", arguments="[1]")], "input[1].arguments"),
        ([USER, call("")], "input[1].call_id"),
        ([USER, call("x", namespace="n")], "input[1].namespace"),
        ([USER, call("x", status="incomplete")], "input[1].status"),
        ([USER, call("x"), call("x")], "input[2].call_id"),
        ([USER, result("x")], "input[1].call_id"),
        ([USER, call("x"), result("x"), result("x")], "input[3].call_id"),
        ([USER, call("x"), result("x", [{"type": "input_image"}])], "input[2].output[0].type"),
    ],
)
def test_items_that_are_refused(given: Any, param: str) -> None:
    error = refused(given)
    assert error.param == param
    assert param in error.message


@pytest.mark.parametrize(
    ("fields", "param", "word"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "input"),
        ({"conversation": "conv_1"}, "conversation", "input"),
        ({"conversation": {"id": "conv_1"}}, "conversation", "input"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt", "instructions"),
        ({"background": True}, "background", "stream"),
        ({"store": True}, "store", "false"),
        ({"truncation": "auto"}, "truncation", "refused"),
        ({"reasoning": {"effort": "high"}}, "reasoning", "leave it out"),
        ({"reasoning": {"effort": "none", "summary": "auto"}}, "reasoning", "leave it out"),
        ({"messages": [USER]}, "messages", "`input`"),
        ({"max_tokens": 3}, "max_tokens", "`max_output_tokens`"),
        ({"max_completion_tokens": 3}, "max_completion_tokens", "`max_output_tokens`"),
        ({"response_format": {"type": "json_object"}}, "response_format", "`text.format`"),
        ({"n": 2}, "n", "one text"),
        ({"service_tier": "flex"}, "service_tier", "leave it out"),
        ({"nonsense": 1}, "nonsense", "unknown"),
        ({"max_output_tokens": 0}, "max_output_tokens", "at least 1"),
        ({"max_output_tokens": "3"}, "max_output_tokens", "whole number"),
        ({"temperature": 2.5}, "temperature", "at most 2"),
        ({"top_p": 1.5}, "top_p", "[0, 1]"),
        ({"stream": "yes"}, "stream", "true or false"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation", "leave it out"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
        ({"top_logprobs": 3}, "top_logprobs", "include"),
        ({"top_logprobs": 21}, "top_logprobs", "at most 20"),
        ({"include": ["everything"]}, "include[0]", "must be"),
        ({"metadata": {str(at): "x" for at in range(17)}}, "metadata", "16"),
        ({"metadata": {"a": 3}}, "metadata", "string"),
        ({"metadata": {"a" * 65: "x"}}, "metadata", "64"),
        ({"metadata": {"a": "x" * 513}}, "metadata", "512"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "medium"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type", "json_object"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name", "required"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "required"),
        (
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"tpye": "object"}}}},
            "text.format.schema.tpye",
            "type",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "web_search"),
        ({"tools": [{"type": "mcp", "server_label": "x"}]}, "tools[0].type", "mcp"),
        ({"tools": [F, {"type": "custom", "name": "x"}]}, "tools[1].type", "custom"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools[0].function", "beside"),
        ({"tools": [{"type": "function"}]}, "tools[0].name", "required"),
        ({"tools": [{**F, "name": "a b"}]}, "tools[0].name", "match"),
        ({"tools": [F, F]}, "tools[1].name", "two functions"),
        ({"tools": [{**F, "parameters": {"type": "array"}}]}, "tools[0].parameters", "object"),
        ({"tools": [{**F, "output_schema": {"type": "object"}}]}, "tools[0].output_schema", "unknown"),
        ({"tools": [{**F, "async": True}]}, "tools[0].async", "False"),
        ({"tools": [F], "tool_choice": "f"}, "tool_choice", "required"),
        ({"tools": [F], "tool_choice": 3}, "tool_choice", "must be"),
        ({"tools": [F], "tool_choice": {"type": "web_search"}}, "tool_choice.type", "web_search"),
        ({"tools": [F], "tool_choice": {"type": "function"}}, "tool_choice.name", "required"),
        ({"tools": [F], "tool_choice": {"type": "function", "name": "h"}}, "tool_choice", "no function 'h'"),
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
    ],
)
def test_parameters_that_are_refused(fields: dict[str, Any], param: str, word: str) -> None:
    error = refused(**fields)
    assert (error.param, word in error.message) == (param, True), error.message


def test_what_asks_for_nothing_passes() -> None:
    plain = wanted()
    nothing = {
        "store": False,
        "background": False,
        "truncation": "disabled",
        "reasoning": {"effort": None, "summary": None},
        "previous_response_id": None,
        "service_tier": "auto",
        "stream": False,
        "stream_options": {"include_obfuscation": False},
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "tool_choice": "auto",
        "tools": [],
        "include": ["reasoning.encrypted_content"],
        "max_tool_calls": 3,
        "parallel_tool_calls": True,
        "prompt_cache_retention": "24h",
        "safety_identifier": "u1",
        "n": 1,
    }
    assert wanted(**nothing).generation == plain.generation


def test_what_is_honoured() -> None:
    read = wanted(
        max_output_tokens=7,
        temperature=0.5,
        top_p=0.9,
        include=["message.output_text.logprobs"],
        top_logprobs=2,
        prompt_cache_key="chat-1",
        stream=True,
        seed=3,
        text={"format": {"type": "json_schema", "name": "x", "schema": PARAMETERS, "strict": True}},
    )
    (made,) = read.generation.calls
    sampling = {"temperature": 0.5, "top_p": 0.9, "logprobs": 2, "seed": 3, "json_schema": json.dumps(PARAMETERS)}
    assert (made.sampling, made.max_tokens, made.session, read.generation.stream) == (sampling, 7, "chat-1", True)
    assert wanted(text={"format": {"type": "json_object"}}).generation.calls[0].sampling == {
        "json_schema": '{"type": "object"}'
    }


@pytest.mark.parametrize(
    ("fields", "tools"),
    [
        ({}, Tools((TOLD_F, TOLD_G), ("g",))),
        ({"tool_choice": "none"}, None),
        ({"tool_choice": "required"}, Tools((TOLD_F, TOLD_G), ("g",), True)),
        ({"parallel_tool_calls": False}, Tools((TOLD_F, TOLD_G), ("g",), parallel=False)),
        ({"tool_choice": {"type": "function", "name": "f"}}, Tools((TOLD_F, TOLD_G), ("g",), True, "f", False)),
        (
            {
                "tool_choice": {
                    "type": "allowed_tools",
                    "mode": "required",
                    "tools": [{"type": "function", "name": "g"}],
                }
            },
            Tools((TOLD_G,), ("g",), True),
        ),
    ],
)
def test_what_may_be_called(fields: dict[str, Any], tools: Tools | None) -> None:
    assert wanted(tools=[F, G], **fields).generation.calls[0].tools == tools


@pytest.mark.parametrize(
    ("param", "own"),
    [
        ("messages[0].content", "instructions"),
        ("messages[2].reasoning_content", "input[1]"),
        ("messages", "input"),
        ("prompt", "input"),
        ("input", "input"),
        ("response_format", "text.format"),
        ("tools[1].function.parameters", "tools[1].parameters"),
        ("tools", "tools"),
        ("temperature", "temperature"),
    ],
)
def test_what_a_replica_refuses_is_told_in_the_words_of_the_request(param: str, own: str) -> None:
    read = wanted([USER, said("x")], instructions="be brief")
    error = read.placed(ApiError(400, f"{param}: cannot be", code="invalid_value", param=param))
    assert (error.param, error.message, error.code) == (own, f"{own}: cannot be", "invalid_value")


FULL = {
    "model": "m",
    "input": [USER, said("well"), call("x"), result("x", PARTS), THOUGHT, said("so"), {**USER, "content": PARTS}],
    "instructions": "be brief",
    "max_output_tokens": 5,
    "temperature": 1.0,
    "top_p": 1.0,
    "stream": True,
    "stream_options": {"include_obfuscation": False},
    "tools": [F, G],
    "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]},
    "parallel_tool_calls": False,
    "text": {"format": {"type": "json_schema", "name": "x", "schema": PARAMETERS, "strict": True}},
    "include": ["message.output_text.logprobs"],
    "top_logprobs": 2,
    "metadata": {"a": "b"},
    "user": "u",
    "safety_identifier": "s",
    "prompt_cache_key": "k",
    "truncation": "disabled",
    "store": False,
    "reasoning": {"effort": "none"},
    "stop": ["x"],
    "logit_bias": {"3": 1.0},
}
JUNK = [None, True, 0, -1, 1.5, 10**30, "", "x", "\x00", [], [[]], [None], [3], {}, {"": None}, {"type": []},
        {"type": "message"}, {"type": "function"}, {"a": {"b": [1]}}]  # fmt: skip


def places(value: Any) -> list[list[Any]]:
    """Return the path of every value inside a value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, each in pairs for path in ([key], *([key, *rest] for rest in places(each)))]


def changed(path: list[Any], junk: Any, whole: dict[str, Any]) -> dict[str, Any]:
    """Return a body with one value put in the place of another."""
    body = copy.deepcopy(whole)
    inside: Any = body
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = junk
    return body


def mistake(body: dict[str, Any]) -> ApiError | None:
    try:
        parse(body, "1")
    except ApiError as error:
        return error
    return None


def test_any_value_anywhere_is_read_or_is_a_400_that_names_it() -> None:
    assert mistake(copy.deepcopy(FULL)) is None
    bodies = [changed(path, junk, FULL) for path in places(FULL) for junk in JUNK]
    bodies += [{**FULL, name: junk} for name in ("x", "a.b[0]", "\x00", "output") for junk in JUNK]
    errors = [(body, mistake(body)) for body in bodies]
    for body, error in errors:
        if error is not None:
            assert error.status == 400, body
            assert any((error.param or "").startswith(name) for name in body), (error.param, body)
    refusals = sum(error is not None for _, error in errors)
    assert refusals > 500
    assert len(errors) - refusals > 100


# -- events -----------------------------------------------------------------------------------------------------------


async def stream(*chunks: Chunk) -> AsyncGenerator[Any, None]:
    for each in chunks:
        yield each


def sent(read: Wanted, *chunks: Chunk, most: int = 1000) -> list[Any]:
    """Return the events as the client's own types read them, each checked against its documented shape."""

    def count(tokens: int) -> None:
        if tokens > most:
            raise ApiError(429, "spent", code="insufficient_quota")

    async def all_of_them() -> bytes:
        return b"".join([raw async for raw in ResponseForm(read).events([stream(*chunks)], 3, count)])

    found = []
    for block in asyncio.run(all_of_them()).decode().strip().split("\n\n"):
        name, data = block.split("\n")
        event = EVENT.validate_json(data.removeprefix("data: "), strict=True)
        assert name == f"event: {event.type}"
        assert event.sequence_number == len(found)
        found.append(event)
    return found


def one(text: str, count: int = 1, reason: Any = None, **fields: Any) -> Chunk:
    return Chunk(text, count, reason, **fields)


def test_the_events_of_a_text() -> None:
    events = sent(wanted(), one("he"), one(""), one("llo", 2, "stop"))
    assert [event.type.removeprefix("response.") for event in events] == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta", "output_text.delta",
        "output_text.done", "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    response = events[-1].response
    assert (response.output_text, response.status, response.usage.total_tokens) == ("hello", "completed", 5)
    assert events[-2].item == response.output[0]
    assert {event.item_id for event in events if hasattr(event, "item_id")} == {response.output[0].id}


def test_the_events_of_calls_one_item_after_another() -> None:
    calls = [CallPiece(0, "f", ""), CallPiece(0, None, '{"a"'), CallPiece(0, None, ": 1}"), CallPiece(1, "g", "{}")]
    events = sent(
        wanted(tools=[F, G]),
        one("so"),
        one("", calls=tuple(calls[:2])),
        one("", 2, calls=tuple(calls[2:])),
        one("", 3, "tool_calls"),
    )
    assert [event.type.removeprefix("response.") for event in events[2:]] == [
        *("output_item.added", "content_part.added", "output_text.delta", "output_text.done", "content_part.done"),
        *("output_item.done", "output_item.added", "function_call_arguments.delta", "function_call_arguments.delta"),
        *("function_call_arguments.done", "output_item.done", "output_item.added", "function_call_arguments.delta"),
        *("function_call_arguments.done", "output_item.done", "completed"),
    ]
    message, first, second = events[-1].response.output
    assert (first.name, first.arguments, second.name, second.arguments) == ("f", '{"a": 1}', "g", "{}")
    assert len({first.call_id, second.call_id}) == 2
    again = [item.model_dump() for item in (message, first, second)]
    prompt = wanted([USER, *again, result(first.call_id)]).generation.calls[0].prompt
    assert [told["role"] for told in prompt] == ["user", "assistant", "tool"], "an answer is taken back"


def test_an_answer_that_was_cut_and_one_without_a_token() -> None:
    events = sent(wanted(max_output_tokens=1), one("he", 1, "length"))
    response = events[-1].response
    assert (events[-1].type, response.status) == ("response.incomplete", "incomplete")
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output[0].status == "incomplete"
    empty = (sent(wanted(), one("", 1, "stop")))[-1].response
    assert (empty.output_text, empty.output[0].content[0].text) == ("", "")


def test_a_budget_that_is_spent_in_the_middle() -> None:
    events = sent(wanted(), one("he"), one("llo", 5), most=4)
    assert [event.type for event in events[-2:]] == ["response.failed", "error"]
    failed = events[-2].response
    assert (failed.status, failed.error.code, failed.usage.output_tokens) == ("failed", "rate_limit_exceeded", 1)
    assert failed.output[0].content[0].text == "he"
    assert (events[-1].code, events[-1].error["type"]) == ("insufficient_quota", "rate_limit_error")


def test_the_whole_is_what_is_streamed() -> None:
    read = wanted(include=["message.output_text.logprobs"], tools=[F], metadata={"a": "b"}, instructions="be")
    token = ScoredToken(b"hi", -0.5, ((b"hi", -0.5),))
    chunks = [one("hi", tokens=(token,)), one("", 2, calls=(CallPiece(0, "f", "{}"),)), one("", 3, "tool_calls")]
    whole = asyncio.run(ResponseForm(read).whole([stream(*chunks)], 3, lambda _: None))
    checked = Response.model_validate(whole, strict=True)
    streamed = (sent(read, *chunks))[-1].response

    def without_ids(response: Any) -> Any:
        told = response.model_dump()
        for item in told["output"]:
            del item["id"]
            item.pop("call_id", None)
        return {**told, "created_at": 0, "completed_at": 0}

    assert without_ids(checked) == without_ids(streamed)
    (entry,) = checked.output[0].content[0].logprobs
    assert (entry.token, entry.bytes, entry.logprob, len(entry.top_logprobs)) == ("hi", [104, 105], -0.5, 1)
    assert (whole["store"], whole["tools"][0]["strict"], whole["metadata"]) == (False, False, {"a": "b"})


def test_a_token_that_turned_out_to_be_text_after_a_call_began() -> None:
    output = Output(logprobs=True)
    output.add(one("a"))
    output.add(one("", calls=(CallPiece(0, "f", "{"),)))
    assert output.add(one("", tokens=(ScoredToken(b"a", -1.0, ()),))) == []
    assert [entry["logprob"] for entry in output.items()[0]["content"][0]["logprobs"]] == [-1.0]


@pytest.mark.parametrize("path", ["/v1/responses/resp_1", "/v1/responses/r/cancel", "/v1/conversations"])
def test_what_is_not_stored_is_said(path: str) -> None:
    assert "not stored" in not_found(path, ["/v1/responses"])
    assert "not stored" not in not_found("/v1/responses/input_tokens", ["/v1/responses"])
