"""The official client against the gateway and a real engine: every field of a request, on both routes."""

from __future__ import annotations

import json
import math
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from serve.engines.text import Decoder
from tests.support import tiny_models
from tests.support.in_process import InProcess, run

HELLO: Any = [{"role": "user", "content": "hello"}]
Scenario = Callable[[openai.AsyncOpenAI], Awaitable[None]]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.language_model(tmp_path_factory.mktemp("tiny"), context=256)


@pytest.fixture
def client(directory: Path) -> Callable[[Scenario], None]:
    """Run a scenario with a client of a fresh endpoint."""

    async def connected(scenario: Scenario, http: httpx.AsyncClient, backend: InProcess) -> None:
        await scenario(openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", max_retries=0, http_client=http))

    return lambda scenario: run(directory, lambda http, backend: connected(scenario, http, backend), max_prompts=16)


@pytest.fixture(scope="module")
def scores(directory: Path) -> Callable[[list[int]], torch.Tensor]:
    """The model's own log-probabilities of a text: row i is for the token after i, [tokens, vocab]."""
    model = AutoModelForCausalLM.from_pretrained(directory).float()

    def of(tokens: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            logprobs: torch.Tensor = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
            return logprobs

    return of


def test_n_choices_count_the_prompt_once(client: Any) -> None:
    async def scenario(it: openai.AsyncOpenAI) -> None:
        fields: Any = {"model": "tiny", "messages": HELLO, "max_tokens": 6}
        whole = await it.chat.completions.create(**fields, n=3, seed=5)
        texts = [choice.message.content for choice in whole.choices]
        assert [choice.index for choice in whole.choices] == [0, 1, 2]
        assert len(set(texts)) == 3
        second = await it.chat.completions.create(**fields, seed=6)
        assert second.choices[0].message.content == texts[1]
        assert second.usage.prompt_tokens == whole.usage.prompt_tokens
        assert whole.usage.completion_tokens > second.usage.completion_tokens
        joined = ["", "", ""]
        async for chunk in await it.chat.completions.create(**fields, n=3, seed=5, stream=True):
            joined[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        assert joined == texts

    client(scenario)


def test_n_choices_of_each_prompt(client: Any) -> None:
    async def scenario(it: openai.AsyncOpenAI) -> None:
        prompts = await it.completions.create(model="tiny", prompt=["for", "def"], n=2, seed=5, max_tokens=4)
        assert [choice.index for choice in prompts.choices] == [0, 1, 2, 3]
        alone = await it.completions.create(model="tiny", prompt="def", seed=6, max_tokens=4)
        assert alone.choices[0].text == prompts.choices[3].text

    client(scenario)


def test_token_ids_are_scored_as_lm_eval_asks(client: Any, scores: Any) -> None:
    """lm-eval's local-completions: token ids, echo, logprobs 1, max_tokens 1; it drops the last entry."""
    prompts = [[40, 41, 42, 99, 7, 300], [17, 9]]

    async def scenario(it: openai.AsyncOpenAI) -> None:
        whole = await it.completions.create(
            model="tiny", prompt=prompts, max_tokens=1, temperature=0, logprobs=1, echo=True, seed=1234
        )
        for choice, prompt in zip(whole.choices, prompts, strict=True):
            expected = scores(prompt)
            *told, last = choice.logprobs.token_logprobs
            assert told[0] is None
            own = [expected[at, token].item() for at, token in enumerate(prompt[1:])]
            assert told[1:] == pytest.approx(own, abs=1e-4)
            best = [max(top.values()) for top in choice.logprobs.top_logprobs[1:-1]]
            assert best == pytest.approx(expected.max(-1).values[:-1].tolist(), abs=1e-4)
            assert last == pytest.approx(expected[-1].max().item(), abs=1e-4)

    client(scenario)


def test_a_prompt_alone_can_be_scored(client: Any) -> None:
    async def scenario(it: openai.AsyncOpenAI) -> None:
        fields: Any = {"model": "tiny", "max_tokens": 0, "echo": True}
        scored = await it.completions.create(**fields, prompt="for i in", logprobs=0)
        choice = scored.choices[0]
        assert (choice.text, choice.finish_reason, scored.usage.completion_tokens) == ("for i in", "length", 0)
        assert "".join(choice.logprobs.tokens) == "for i in"
        lengths = [len(token) for token in choice.logprobs.tokens]
        assert choice.logprobs.text_offset == [sum(lengths[:at]) for at in range(len(lengths))]
        echoed = await it.completions.create(**fields, prompt="for i in")
        assert (echoed.choices[0].text, echoed.choices[0].logprobs) == ("for i in", None)
        full = await it.completions.create(**fields, prompt=[9] * 256, logprobs=0)
        assert len(full.choices[0].logprobs.token_logprobs) == 256
        with pytest.raises(openai.BadRequestError, match="context is 256"):
            await it.completions.create(**fields, prompt=[9] * 257, logprobs=0)

    client(scenario)


def test_echo_puts_the_prompt_in_front_streamed_or_not(client: Any) -> None:
    async def scenario(it: openai.AsyncOpenAI) -> None:
        fields: Any = {"model": "tiny", "prompt": "the quick", "max_tokens": 5, "temperature": 0}
        plain = await it.completions.create(**fields)
        whole = await it.completions.create(**fields, echo=True, logprobs=2)
        assert whole.choices[0].text == "the quick" + plain.choices[0].text
        text, tokens, offsets = "", [], []
        async for chunk in await it.completions.create(**fields, echo=True, logprobs=2, stream=True):
            text += chunk.choices[0].text
            tokens += chunk.choices[0].logprobs.tokens
            offsets += chunk.choices[0].logprobs.text_offset
        assert text == whole.choices[0].text
        assert (tokens, offsets) == (whole.choices[0].logprobs.tokens, whole.choices[0].logprobs.text_offset)

    client(scenario)


def test_chat_logprobs_are_the_model_s_own(client: Any, scores: Any, directory: Path) -> None:
    """Not those of the distribution that was drawn from: neither temperature nor penalty shows in them."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    decode = Decoder(tokenizer)
    fields: Any = {"model": "tiny", "messages": HELLO, "max_tokens": 6, "temperature": 2.0, "seed": 3}
    fields |= {"logprobs": True, "top_logprobs": 4, "presence_penalty": 1.5}

    async def scenario(it: openai.AsyncOpenAI) -> None:
        whole = await it.chat.completions.create(**fields)
        told = whole.choices[0].logprobs.content
        ids = tokenizer.apply_chat_template(HELLO, add_generation_prompt=True)["input_ids"]
        for entry in told:
            row = scores(ids)[-1]
            assert [top.logprob for top in entry.top_logprobs] == pytest.approx(row.topk(4).values.tolist(), abs=1e-4)
            near = [token for token in range(len(row)) if math.isclose(row[token], entry.logprob, abs_tol=1e-4)]
            named = [token for token in near if entry.bytes == list(decode.token_bytes(token))]
            ids.append(named[0])
        streamed: list[Any] = []
        async for chunk in await it.chat.completions.create(**fields, stream=True):
            if chunk.choices[0].logprobs:
                streamed += chunk.choices[0].logprobs.content
        assert streamed == told

    client(scenario)


def test_logit_bias_forces_and_must_name_tokens(client: Any) -> None:
    async def scenario(it: openai.AsyncOpenAI) -> None:
        fields: Any = {"model": "tiny", "prompt": "for", "max_tokens": 4}
        forced = await it.completions.create(**fields, logit_bias={"70": 100}, logprobs=0)
        assert len(set(forced.choices[0].logprobs.tokens)) == 1
        for bias in ({"99999": 1}, {"x": 1}, {"5": 200}):
            with pytest.raises(openai.BadRequestError) as refused:
                await it.completions.create(**fields, logit_bias=bias)
            assert refused.value.param == "logit_bias"

    client(scenario)


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
PERSON: Any = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": SCHEMA}}


def test_a_random_model_answers_in_the_schema(client: Any) -> None:
    async def scenario(it: openai.AsyncOpenAI) -> None:
        fields: Any = {"model": "tiny", "messages": HELLO, "max_tokens": 230, "response_format": PERSON}
        whole = await it.chat.completions.create(**fields, n=4, seed=1)
        for choice in whole.choices:
            assert choice.finish_reason == "stop"
            jsonschema.validate(json.loads(choice.message.content), SCHEMA)
        text = ""
        async for chunk in await it.chat.completions.create(**fields, seed=2, stream=True):
            text += chunk.choices[0].delta.content or ""
        assert text == whole.choices[1].message.content
        completed = await it.completions.create(
            model="tiny", prompt="for", seed=1, max_tokens=230, extra_body={"response_format": PERSON}
        )
        jsonschema.validate(json.loads(completed.choices[0].text), SCHEMA)

    client(scenario)


def test_any_object_and_no_format(client: Any) -> None:
    async def scenario(it: openai.AsyncOpenAI) -> None:
        fields: Any = {"model": "tiny", "messages": HELLO, "max_tokens": 40, "temperature": 0}
        free = await it.chat.completions.create(**fields, response_format={"type": "json_object"})
        assert free.choices[0].message.content.startswith("{")
        plain = await it.chat.completions.create(**fields)
        text = await it.chat.completions.create(**fields, response_format={"type": "text"})
        assert text.choices[0].message.content == plain.choices[0].message.content

    client(scenario)


@pytest.mark.parametrize("schema", [{"type": "wizard"}, {"type": "object", "not": {"required": ["a"]}}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_that_cannot_be_followed_is_refused(client: Any, schema: Any, stream: bool) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}

    async def scenario(it: openai.AsyncOpenAI) -> None:
        with pytest.raises(openai.BadRequestError) as refused:
            await it.chat.completions.create(model="tiny", messages=HELLO, response_format=wanted, stream=stream)
        assert refused.value.param == "response_format"

    client(scenario)


def test_what_cannot_be_honoured_is_a_400_that_names_it(client: Any) -> None:
    async def scenario(it: openai.AsyncOpenAI) -> None:
        chat: Any = {"model": "tiny", "messages": HELLO}
        text: Any = {"model": "tiny", "prompt": "for"}
        tool = {"type": "function", "function": {"name": "f"}}
        cases: list[tuple[Any, Any, str]] = [
            (it.chat.completions.create, {**chat, "tools": [tool]}, "tools"),
            (it.chat.completions.create, {**chat, "top_logprobs": 2}, "top_logprobs"),
            (it.chat.completions.create, {**chat, "n": 129}, "n"),
            (it.chat.completions.create, {**chat, "max_tokens": 0}, "max_tokens"),
            (it.completions.create, {**text, "suffix": "x"}, "suffix"),
            (it.completions.create, {**text, "best_of": 3}, "best_of"),
            (it.completions.create, {**text, "n": 17}, "n"),
            (it.completions.create, {**text, "max_tokens": 0}, "max_tokens"),
            (it.completions.create, {**text, "logprobs": 21}, "logprobs"),
            (it.completions.create, {**text, "extra_body": {"guided_json": {"type": "object"}}}, "guided_json"),
        ]
        for create, fields, param in cases:
            with pytest.raises(openai.BadRequestError) as refused:
                await create(**fields)
            assert refused.value.param == param

    client(scenario)
