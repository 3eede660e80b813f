"""The official client's Responses API against the gateway and a real engine over random models."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest
import torch
from pydantic import BaseModel, ConfigDict, Field

from serve.api.body import ApiError
from tests.support import tiny_models, tool_templates
from tests.support.in_process import InProcess, run

Scenario = Callable[[openai.AsyncOpenAI, InProcess], Awaitable[None]]
HELLO: Any = {"model": "tiny", "input": "hello", "temperature": 0}


class Weather(BaseModel):
    """The weather of a place."""

    model_config = ConfigDict(extra="forbid")
    place: Literal["Kiel", "Ulm"]
    degrees: int = Field(ge=-20, le=40)


WEATHER: Any = {"type": "function", "name": "weather", "parameters": Weather.model_json_schema()}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = tiny_models.tokenizer()
    tokenizer.chat_template = tool_templates.HERMES
    return tiny_models.language_model(tmp_path_factory.mktemp("tools"), fast=tokenizer, layers=1, context=1024)


@pytest.fixture
def client(directory: Path) -> Callable[[Scenario], None]:
    """Run a scenario with a client of a fresh endpoint."""

    async def connected(scenario: Scenario, http: httpx.AsyncClient, backend: InProcess) -> None:
        it = openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", max_retries=0, http_client=http)
        await scenario(it, backend)

    return lambda scenario: run(directory, lambda http, backend: connected(scenario, http, backend))


def test_the_text_is_that_of_chat_streamed_or_not(client: Any) -> None:
    async def scenario(it: openai.AsyncOpenAI, backend: InProcess) -> None:
        chat = await it.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hello"}], temperature=0, max_tokens=9
        )
        whole = await it.responses.create(**HELLO, max_output_tokens=9)
        assert whole.output_text == chat.choices[0].message.content
        assert (whole.usage.input_tokens, whole.usage.output_tokens) == (
            chat.usage.prompt_tokens,
            chat.usage.completion_tokens,
        )
        assert (whole.status, whole.incomplete_details.reason) == ("incomplete", "max_output_tokens")
        async with it.responses.stream(**HELLO, max_output_tokens=9) as stream:
            events = [event async for event in stream]
        assert [events[0].type, events[-1].type] == ["response.created", "response.incomplete"]
        deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
        assert deltas == events[-1].response.output_text == whole.output_text

        led = await it.responses.create(**HELLO, instructions="be brief", max_output_tokens=3)
        assert led.usage.input_tokens > whole.usage.input_tokens
        again: Any = [{"role": "user", "content": "hello"}, *whole.output, {"role": "user", "content": "more"}]
        more = await it.responses.create(**{**HELLO, "input": again}, max_output_tokens=3)
        assert more.usage.input_tokens > whole.usage.input_tokens + whole.usage.output_tokens

    client(scenario)


def test_parse_gives_a_model_of_pydantic(client: Any) -> None:
    async def scenario(it: openai.AsyncOpenAI, backend: InProcess) -> None:
        made = await it.responses.parse(**HELLO, text_format=Weather, max_output_tokens=400)
        assert isinstance(made.output_parsed, Weather)
        async with it.responses.stream(**HELLO, text_format=Weather, max_output_tokens=400) as stream:
            final = await stream.get_final_response()
        assert final.output_parsed == made.output_parsed
        free = await it.responses.create(**HELLO, text={"format": {"type": "json_object"}}, max_output_tokens=400)
        assert free.status == "incomplete" or isinstance(json.loads(free.output_text), dict)

    client(scenario)


def test_a_call_and_its_result_sent_back(client: Any) -> None:
    fields: Any = {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False}

    async def scenario(it: openai.AsyncOpenAI, backend: InProcess) -> None:
        made = await it.responses.create(**HELLO, **fields, max_output_tokens=400)
        (call,) = made.output
        assert (call.type, call.name, made.status) == ("function_call", "weather", "completed")
        Weather.model_validate_json(call.arguments)
        async with it.responses.stream(**HELLO, **fields, max_output_tokens=400) as stream:
            final = await stream.get_final_response()
        assert final.output[0].arguments == call.arguments
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
        history = [{"role": "user", "content": "hello"}, call.model_dump(), result]
        more = await it.responses.create(**{**HELLO, "input": history}, tools=[WEATHER], max_output_tokens=3)
        assert more.usage.input_tokens > made.usage.input_tokens

    client(scenario)


def test_log_probabilities_add_up_to_the_text(client: Any) -> None:
    async def scenario(it: openai.AsyncOpenAI, backend: InProcess) -> None:
        fields: Any = {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "max_output_tokens": 8}
        whole = await it.responses.create(**HELLO, **fields)
        told = whole.output[0].content[0].logprobs
        assert b"".join(bytes(entry.bytes) for entry in told).decode(errors="replace") == whole.output_text
        assert {len(entry.top_logprobs) for entry in told} == {2}
        streamed = [event async for event in await it.responses.create(**HELLO, **fields, stream=True)]
        deltas = [each for event in streamed if event.type == "response.output_text.delta" for each in event.logprobs]
        assert [each.logprob for each in deltas] == [entry.logprob for entry in told]

    client(scenario)


def test_errors_are_the_clients_own(client: Any) -> None:
    async def scenario(it: openai.AsyncOpenAI, backend: InProcess) -> None:
        create = it.responses.create
        with pytest.raises(openai.NotFoundError, match="does not exist here"):
            await create(model="none-such", input="hello")
        with pytest.raises(openai.BadRequestError) as refused:
            await create(**HELLO, previous_response_id="resp_1")
        assert refused.value.param == "previous_response_id"
        with pytest.raises(openai.BadRequestError) as refused:
            await create(**{**HELLO, "input": "hello " * 3000}, stream=True)
        assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "input")
        wanted: Any = {"type": "json_schema", "name": "x", "schema": {"type": "array", "uniqueItems": True}}
        with pytest.raises(openai.BadRequestError) as refused:
            await create(**HELLO, text={"format": wanted})
        assert refused.value.param == "text.format"
        assert "text.format: " in refused.value.message
        with pytest.raises(openai.NotFoundError, match="not stored"):
            await it.responses.retrieve("resp_1")
        with pytest.raises(openai.NotFoundError, match="not stored"):
            await it.responses.delete("resp_1")
        with pytest.raises(openai.NotFoundError, match="not stored"):
            await it.responses.cancel("resp_1")
        with pytest.raises(openai.NotFoundError, match="not stored"):
            await it.responses.input_items.list("resp_1")
        with pytest.raises(openai.NotFoundError, match="not stored"):
            await it.conversations.create()

    client(scenario)


def test_an_error_in_the_middle_is_told_and_raised(client: Any) -> None:
    async def scenario(it: openai.AsyncOpenAI, backend: InProcess) -> None:
        backend.failure = ApiError(503, "the replica is gone", code="replica_lost")
        seen: list[Any] = []

        async def read() -> None:
            async for event in await it.responses.create(**HELLO, stream=True):
                seen.append(event)

        with pytest.raises(openai.APIError, match="the replica is gone"):
            await read()
        assert seen[-1].type == "response.failed"
        assert seen[-1].response.error.code == "server_error"
        assert any(event.type == "response.output_text.delta" for event in seen)

    client(scenario)
