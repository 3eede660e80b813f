"""Tools, text offsets and lengths with the official client, the gateway and a real engine over random models."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest
import torch

from tests.support import tiny_models, tool_templates
from tests.support.in_process import InProcess, run

Scenario = Callable[[openai.AsyncOpenAI], Awaitable[None]]
HELLO: Any = [{"role": "user", "content": "hello"}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Kiel", "Ulm"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER: Any = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
CLOCK: Any = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "maxProperties": 0}}}
NAMED: Any = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def with_tools(family: str) -> Any:
    """Return a tokenizer of a family: its template, and its marks as tokens, special ones where the family has them."""
    from tokenizers import AddedToken

    tokenizer = tiny_models.tokenizer()
    tokenizer.chat_template = tool_templates.FAMILIES[family]
    if family == "hermes":
        tokenizer.add_tokens([AddedToken(mark, special=False) for mark in ("<tool_call>", "</tool_call>")])
    if family == "mistral":
        tokenizer.add_tokens([AddedToken("[TOOL_CALLS]", special=True)], special_tokens=True)
    return tokenizer


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {"meta": tiny_models.metaspace_tokenizer(), "plain": tiny_models.tokenizer()}
    made |= {family: with_tools(family) for family in tool_templates.FAMILIES}
    base = tmp_path_factory.mktemp("models")
    return {
        name: tiny_models.language_model(base / name, fast=fast, layers=1, context=2048) for name, fast in made.items()
    }


@pytest.fixture
def client(directories: dict[str, Path]) -> Callable[[str, Scenario], None]:
    """Run a scenario with a client of a fresh endpoint of one of the models."""

    async def connected(scenario: Scenario, http: httpx.AsyncClient, backend: InProcess) -> None:
        await scenario(openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", max_retries=0, http_client=http))

    return lambda name, scenario: run(directories[name], lambda http, backend: connected(scenario, http, backend))


async def streamed(stream: Any) -> tuple[str, list[list[str]], str]:
    """Join a stream: its content, its calls as name and arguments, and why it ended."""
    content, calls, reason = "", [], ""
    async for chunk in stream:
        for choice in chunk.choices:
            content += choice.delta.content or ""
            for call in choice.delta.tool_calls or ():
                if call.function.name:
                    assert call.id.startswith("call_")
                    calls.append([call.function.name, ""])
                calls[call.index][1] += call.function.arguments
            reason = choice.finish_reason or reason
    return content, calls, reason


@pytest.mark.parametrize("family", tool_templates.FAMILIES)
def test_a_random_model_calls_what_it_must(client: Any, family: str) -> None:
    fields: Any = {"model": "tiny", "messages": HELLO, "max_tokens": 400, "tools": [WEATHER, CLOCK], "seed": 7}

    async def scenario(it: openai.AsyncOpenAI) -> None:
        named = await it.chat.completions.create(**fields, tool_choice=NAMED)
        message = named.choices[0].message
        assert (named.choices[0].finish_reason, message.content) == ("tool_calls", None)
        (call,) = message.tool_calls
        assert call.function.name == "weather"
        jsonschema.validate(json.loads(call.function.arguments), PARAMETERS)
        again = await it.chat.completions.create(**fields, tool_choice=NAMED, stream=True)
        assert await streamed(again) == ("", [["weather", call.function.arguments]], "tool_calls")

        one = await it.chat.completions.create(**fields, tool_choice="required", parallel_tool_calls=False, n=4)
        for choice in one.choices:
            assert choice.finish_reason == "tool_calls"
            (call,) = choice.message.tool_calls
            assert call.function.name in ("weather", "clock")

        # the calls go back with their results, as clients send them
        results = [{"role": "tool", "tool_call_id": call.id, "content": "3 degrees"} for call in message.tool_calls]
        history = [*HELLO, message.model_dump(exclude_none=True), *results, *HELLO]
        more = await it.chat.completions.create(**{**fields, "messages": history, "max_tokens": 3})
        assert more.usage.prompt_tokens > named.usage.prompt_tokens

    client(family, scenario)


def test_several_calls_where_the_template_can_tell_of_them(client: Any) -> None:
    fields: Any = {"model": "tiny", "messages": HELLO, "max_tokens": 300, "tools": [CLOCK], "tool_choice": "required"}

    async def most(it: openai.AsyncOpenAI) -> int:
        whole = await it.chat.completions.create(**fields, n=8, seed=1, temperature=2)
        return max(len(choice.message.tool_calls or ()) for choice in whole.choices)

    async def several(it: openai.AsyncOpenAI) -> None:
        assert await most(it) > 1

    async def single(it: openai.AsyncOpenAI) -> None:
        assert await most(it) == 1

    client("json", several)
    client("llama3", single)


def test_no_call_without_tools(client: Any) -> None:
    fields: Any = {"model": "tiny", "messages": HELLO, "max_tokens": 12, "temperature": 0}

    async def scenario(it: openai.AsyncOpenAI) -> None:
        plain = await it.chat.completions.create(**fields)
        hidden = await it.chat.completions.create(**fields, tools=[WEATHER], tool_choice="none")
        assert hidden.choices[0].message == plain.choices[0].message
        assert hidden.usage == plain.usage
        offered = await it.chat.completions.create(**fields, tools=[WEATHER])
        assert offered.usage.prompt_tokens > plain.usage.prompt_tokens
        text, calls, reason = await streamed(await it.chat.completions.create(**fields, tools=[WEATHER], stream=True))
        assert (text, calls, reason) == (offered.choices[0].message.content, [], offered.choices[0].finish_reason)

    client("hermes", scenario)


def test_strict_functions_and_a_format_beside_calls(client: Any) -> None:
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    number: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": [17, 18]}}}
    fields: Any = {"model": "tiny", "messages": HELLO, "max_tokens": 300, "seed": 3, "n": 4}

    async def scenario(it: openai.AsyncOpenAI) -> None:
        whole = await it.chat.completions.create(**fields, tools=[strict], response_format=number)
        for choice in whole.choices:
            if choice.message.content is not None:
                assert choice.message.content in ("17", "18")
            complete = choice.finish_reason != "length"
            for call in (choice.message.tool_calls or ())[: None if complete else -1]:
                jsonschema.validate(json.loads(call.function.arguments), PARAMETERS)

    client("hermes", scenario)


def test_a_model_that_cannot_call_says_so(client: Any) -> None:
    fields: Any = {"model": "tiny", "messages": HELLO, "max_tokens": 4}
    wizard = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "wizard"}}}}}

    async def plain(it: openai.AsyncOpenAI) -> None:
        for choice in ("auto", "required"):
            with pytest.raises(openai.BadRequestError, match="chat template has no place for them") as refused:
                await it.chat.completions.create(**fields, tools=[WEATHER], tool_choice=choice)
            assert refused.value.param == "tools"

    async def hermes(it: openai.AsyncOpenAI) -> None:
        with pytest.raises(openai.BadRequestError) as refused:
            await it.chat.completions.create(**fields, tools=[wizard], tool_choice="required")
        assert refused.value.param == "tools"

    client("plain", plain)
    client("hermes", hermes)


# -- text offsets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "meta"])
@pytest.mark.parametrize("prompt", ["x é🎉 y", " x", "", [1, 40, 200, 201, 60]])
def test_offsets_point_into_the_text(client: Any, name: str, prompt: Any) -> None:
    async def scenario(it: openai.AsyncOpenAI) -> None:
        fields: Any = {"model": "tiny", "prompt": prompt, "max_tokens": 20, "logprobs": 2, "seed": 5}
        for echo in (True, False):
            whole = await it.completions.create(**fields, echo=echo)
            text, told = whole.choices[0].text, whole.choices[0].logprobs
            assert len(told.tokens) == whole.usage.completion_tokens + echo * whole.usage.prompt_tokens
            assert told.text_offset == sorted(told.text_offset)
            for token, offset, top in zip(told.tokens, told.text_offset, told.top_logprobs, strict=True):
                assert token.startswith("bytes:") or text[offset:].startswith(token)
                assert top is None or token in top
            parts: Any = [
                chunk.choices[0] async for chunk in await it.completions.create(**fields, echo=echo, stream=True)
            ]
            assert "".join(part.text for part in parts) == text
            assert [at for part in parts if part.logprobs for at in part.logprobs.text_offset] == told.text_offset

    client(name, scenario)


@pytest.mark.parametrize("stop", ["gamma", "🎉日", 'delta"', "never"])
def test_scored_tokens_are_those_of_the_content(client: Any, stop: str) -> None:
    said = "alpha beta gamma 🎉日本é delta"
    schema: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": said}}}
    fields: Any = {"model": "tiny", "messages": HELLO, "response_format": schema, "logprobs": True, "stop": [stop]}

    async def scenario(it: openai.AsyncOpenAI) -> None:
        whole = await it.chat.completions.create(**fields, max_tokens=120)
        content = whole.choices[0].message.content
        assert content == f'"{said}"'.partition(stop)[0]
        entries = whole.choices[0].logprobs.content
        assert bytes(byte for entry in entries for byte in entry.bytes).decode() == content
        parts = [c.choices[0] async for c in await it.chat.completions.create(**fields, max_tokens=120, stream=True)]
        told = [entry for part in parts if part.logprobs for entry in part.logprobs.content]
        assert [entry.bytes for entry in told] == [entry.bytes for entry in entries]

    client("plain", scenario)


def test_a_word_keeps_its_space_after_the_prompt(client: Any) -> None:
    the = tiny_models.metaspace_tokenizer().convert_tokens_to_ids("▁the")

    async def scenario(it: openai.AsyncOpenAI) -> None:
        forced: Any = {"max_tokens": 2, "logit_bias": {str(the): 100}}
        for echo, text in ((False, " the the"), (True, "x the the")):
            whole = await it.completions.create(model="tiny", prompt="x", echo=echo, **forced)
            assert whole.choices[0].text == text

    client("meta", scenario)


# -- lengths ---------------------------------------------------------------------------------------------------------


def test_least_length_and_more_ends(client: Any) -> None:
    tokenizer = tiny_models.tokenizer()
    end, letter = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("x")

    async def scenario(it: openai.AsyncOpenAI) -> None:
        fields: Any = {"model": "tiny", "prompt": "for", "max_tokens": 9, "seed": 1}
        ending = await it.completions.create(**fields, logit_bias={str(end): 100})
        assert (ending.usage.completion_tokens, ending.choices[0].finish_reason) == (1, "stop")
        later = await it.completions.create(**fields, logit_bias={str(end): 100}, extra_body={"min_tokens": 4})
        assert (later.usage.completion_tokens, later.choices[0].finish_reason) == (5, "stop")
        forced: Any = {**fields, "logit_bias": {str(letter): 100}}
        stopped = await it.completions.create(**forced, extra_body={"stop_token_ids": [letter]})
        assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == ("", "stop")
        cut = await it.completions.create(**forced, stop="xx", extra_body={"min_tokens": 3})
        assert cut.choices[0].text == "xxx"
        with pytest.raises(openai.BadRequestError) as refused:
            await it.completions.create(**fields, extra_body={"stop_token_ids": [99999]})
        assert refused.value.param == "stop_token_ids"

    client("plain", scenario)


def test_top_p_0_is_the_most_likely_token(client: Any) -> None:
    async def scenario(it: openai.AsyncOpenAI) -> None:
        fields: Any = {"model": "tiny", "messages": HELLO, "max_tokens": 8}
        greedy = await it.chat.completions.create(**fields, temperature=0)
        narrow = await it.chat.completions.create(**fields, temperature=2, top_p=0)
        assert narrow.choices[0].message.content == greedy.choices[0].message.content

    client("plain", scenario)


def test_usage_in_every_chunk(client: Any) -> None:
    async def scenario(it: openai.AsyncOpenAI) -> None:
        options: Any = {"include_usage": True, "continuous_usage_stats": True}
        stream = await it.chat.completions.create(
            model="tiny", messages=HELLO, max_tokens=5, stream=True, stream_options=options
        )
        told = [chunk.usage async for chunk in stream]
        counts = [usage.completion_tokens for usage in told if usage is not None]
        assert len(counts) == len(told)
        assert counts == sorted(counts)
        assert (counts[0], told[0].total_tokens) == (0, told[0].prompt_tokens)
        assert counts[-1] == counts[-2]

    client("plain", scenario)
