"""Responses answers: the events of a stream in their order, as the client's own types read them, and the whole."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from serve.api.body import ApiError
from serve.api.responses.answer import ResponseForm
from serve.api.responses.output import Output
from serve.api.responses.parse import Wanted
from serve.api.routes import not_found
from serve.wire import CallPiece, Chunk, ScoredToken
from tests.support.responses import USER, F, G, result, wanted

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


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
