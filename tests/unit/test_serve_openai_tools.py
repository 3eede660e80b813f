"""Tools in OpenAI's requests and answers: what is parsed, what is refused by name, what the client's types accept."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from serve.api.body import ApiError
from serve.api.openai_answers import Answer, Text, usage
from serve.api.openai_api import parse_chat
from serve.wire import CallPiece, Tools

HELLO = [{"role": "user", "content": "hello"}]
PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}}
F = {"type": "function", "function": {"name": "f", "description": "does", "parameters": PARAMETERS}}
G = {"type": "function", "function": {"name": "g", "strict": True}}
TOLD_F = {"name": "f", "description": "does", "parameters": PARAMETERS}
TOLD_G = {"name": "g", "description": "", "parameters": {"type": "object", "properties": {}}}


def chat(**fields: Any) -> Any:
    return parse_chat({"model": "m", "messages": HELLO, **fields}, "1")


def call(name: str, at: str, arguments: str = "{}") -> dict[str, Any]:
    return {"id": at, "type": "function", "function": {"name": name, "arguments": arguments}}


def result(at: str, content: Any = "4") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": at, "content": content}


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, Tools((TOLD_F, TOLD_G), ("g",))),
        ({"tool_choice": "auto"}, Tools((TOLD_F, TOLD_G), ("g",))),
        ({"tool_choice": "none"}, None),
        ({"tool_choice": "required"}, Tools((TOLD_F, TOLD_G), ("g",), True)),
        ({"parallel_tool_calls": False}, Tools((TOLD_F, TOLD_G), ("g",), parallel=False)),
        (
            {"tool_choice": {"type": "function", "function": {"name": "f"}}},
            Tools((TOLD_F, TOLD_G), ("g",), True, "f", False),
        ),
        (
            {
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "g"}}]},
                }
            },
            Tools((TOLD_G,), ("g",), True),
        ),
    ],
)
def test_what_may_be_called(fields: dict[str, Any], wanted: Tools | None) -> None:
    assert chat(tools=[F, G], **fields).calls[0].tools == wanted


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [F], "tool_choice": "always"}, "tool_choice"),
        ({"tools": [F], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"tools": [F, F]}, "tools[1].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}]},
            "tools[0].function.parameters",
        ),
    ],
)
def test_tools_that_cannot_be_are_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        chat(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_calls_and_results_in_the_history() -> None:
    """Arguments become objects, results stand in the order of their calls, whatever order they were sent in."""
    assistant = {"role": "assistant", "content": None, "tool_calls": [call("f", "1", '{"a": 1}'), call("g", "2", "")]}
    sent = [*HELLO, assistant, result("2", [{"type": "text", "text": "b"}]), result("1"), *HELLO]
    assert chat(messages=sent).calls[0].prompt == (
        HELLO[0],
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}},
                {"id": "2", "type": "function", "function": {"name": "g", "arguments": {}}},
            ],
        },
        {"role": "tool", "content": "4", "tool_call_id": "1", "name": "f"},
        {"role": "tool", "content": "b", "tool_call_id": "2", "name": "g"},
        HELLO[0],
    )


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([result("1")], "messages[0].tool_call_id"),
        ([{"role": "tool", "content": "4"}], "messages[0].tool_call_id"),
        (
            [{"role": "assistant", "tool_calls": [call("f", "1", "{")]}],
            "messages[0].tool_calls[0].function.arguments",
        ),
        (
            [{"role": "assistant", "tool_calls": [call("f", "1"), call("f", "2", "[1]")]}],
            "messages[0].tool_calls[1].function.arguments",
        ),
        ([{"role": "user", "content": "x", "tool_calls": [call("f", "1")]}], "messages[0].tool_calls"),
        ([{"role": "user", "content": "x", "tool_call_id": "1"}], "messages[0].tool_call_id"),
        ([{"role": "assistant", "tool_calls": []}], "messages[0].content"),
        ([{"role": "assistant", "tool_calls": [call("f", "1"), call("g", "1")]}], "messages[0].tool_calls"),
        (
            [{"role": "assistant", "tool_calls": [call("f", "1")]}, result("1"), result("1")],
            "messages[2].tool_call_id",
        ),
        ([{"role": "function", "name": "f", "content": "4"}], "messages[0].role"),
        ([{"role": "assistant", "tool_calls": [call("f", "1")]}, result("1", None)], "messages[1].content"),
        (
            [{"role": "assistant", "tool_calls": [call("f", "1")]}, {**result("1"), "name": "g"}],
            "messages[1].name",
        ),
    ],
)
def test_a_history_that_cannot_be_is_named(messages: list[Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        chat(messages=messages)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_an_id_may_come_again_in_a_later_turn() -> None:
    turn = [{"role": "assistant", "content": None, "tool_calls": [call("f", "1")]}, result("1")]
    assert len(chat(messages=[*turn, *turn]).calls[0].prompt) == 4


PIECES = [CallPiece(0, "f", ""), CallPiece(0, None, '{"a":'), CallPiece(0, None, " 1}"), CallPiece(1, "g", "{}")]


def test_calls_are_what_the_client_expects() -> None:
    generation = chat(tools=[F, G])
    whole = ChatCompletion.model_validate(
        Answer(generation).whole([Text("", "tool_calls", (), PIECES)], usage(3, 4)), strict=True
    )
    message = whole.choices[0].message
    assert (whole.choices[0].finish_reason, message.content) == ("tool_calls", None)
    calls: Any = message.tool_calls
    assert [(made.function.name, made.function.arguments) for made in calls] == [("f", '{"a": 1}'), ("g", "{}")]
    assert len({made.id for made in calls if made.id.startswith("call_")}) == 2


def test_streamed_calls_are_what_the_client_expects() -> None:
    answer = Answer(chat(tools=[F, G], stream=True))
    chunks = [answer.opening(0), *(answer.chunk(0, Text("", None, (), [piece])) for piece in PIECES)]
    deltas = [ChatCompletionChunk.model_validate(chunk, strict=True).choices[0].delta for chunk in chunks]
    assert (deltas[0].role, deltas[0].content) == ("assistant", None)
    told: list[Any] = [delta.tool_calls[0] for delta in deltas[1:] if delta.tool_calls]
    assert [(one.index, one.function.name, one.function.arguments) for one in told] == [
        (0, "f", ""),
        (0, None, '{"a":'),
        (0, None, " 1}"),
        (1, "g", "{}"),
    ]
    assert [one.id is None for one in told] == [False, True, True, False]
