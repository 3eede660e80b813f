"""Responses requests: what is parsed, and what is refused by name."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from serve.api.body import ApiError
from serve.api.responses.parse import parse
from serve.wire import Tools
from tests.support.responses import (
    FULL,
    JUNK,
    PARAMETERS,
    PARTS,
    THOUGHT,
    USER,
    F,
    G,
    call,
    changed,
    places,
    result,
    said,
    wanted,
)

TOLD_F = {"name": "f", "description": "does", "parameters": PARAMETERS}
TOLD_G = {"name": "g", "description": "", "parameters": {"type": "object", "properties": {}}}


def refused(given: Any = "hello", **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        wanted(given, **fields)
    assert caught.value.status == 400
    return caught.value


def told_call(at: str, name: str = "f") -> dict[str, Any]:
    return {"id": at, "type": "function", "function": {"name": name, "arguments": {"a": 1}}}


def tool(at: str, name: str = "f", content: str = "4") -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": at, "name": name}


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
        ([{"type": "reasoning", "summary": []}], "input"),
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
