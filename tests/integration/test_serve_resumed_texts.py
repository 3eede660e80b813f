"""A text whose replica is lost, at any token, goes on at another replica as if nothing had been."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from serve.engines.protocol import EngineLoad
from serve.engines.replica import GenerativeReplica
from serve.routing.resuming import Message
from serve.wire import GenerateCall, Identity, Refused, Tools
from tests.support import tiny_models, tool_templates
from tests.support.lossy import Joined, check, joined, serving

WORDS = {
    "type": "object",
    "properties": {"a": {"enum": ["é漢字🎈", "ñ🎈🎈"]}, "b": {"enum": [1, 22]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
CALLED = {"name": "f", "description": "", "parameters": WORDS}
SEEDED = {"temperature": 0.9, "top_k": 8, "seed": 5, "ignore_eos": True}
"""Of few tokens: with 300 nearly alike, a draw lies within rounding of the border between two now and then."""
PROMPT = tuple(range(5, 45))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0, "ignore_eos": True},
    "seeded": {**SEEDED, "temperature": 0.5, "top_k": 0},
    "top_k": SEEDED,
    "top_p": {**SEEDED, "top_p": 0.3},
    "min_p": {**SEEDED, "top_k": 20, "min_p": 0.3},
    "penalties": {
        **{**SEEDED, "temperature": 0.3},
        **{"presence_penalty": 1.5, "frequency_penalty": 1.0, "repetition_penalty": 1.3},
    },
    "greedy with penalties": {"temperature": 0, "frequency_penalty": 2.0, "ignore_eos": True},
    "logit_bias": {**SEEDED, "logit_bias": {40: 8.0, 41: 8.0, 42: -100.0}},
    "logprobs": {**SEEDED, "logprobs": 3},
    "a seed as the gateway draws them": {**SEEDED, "seed": 2**61 + 3},
}


def test_texts_go_on_as_they_were_drawn() -> None:
    async def scenario() -> None:
        async with serving(tiny_models.tokenizer()) as served:
            texts = {}
            for name, sampling in SAMPLINGS.items():
                texts[name] = await check(served, GenerateCall(name, PROMPT, sampling, 16))
                assert texts[name].finish_reason == "length", name
            assert len({text.ids for text in texts.values()}) == len(texts) - 1  # log-probabilities change no text
            assert len(texts["logprobs"].logprobs) == 16 * 4

    asyncio.run(scenario())


def test_texts_end_where_they_would_have_ended() -> None:
    """Stop strings that lie across the cut, their beginnings that are held back, end tokens, least lengths."""

    async def scenario() -> None:
        async with serving(tiny_models.tokenizer()) as served:
            free = joined(await served.told(GenerateCall("free", PROMPT, SEEDED, 16)))
            half = len(free.text) // 2
            stop, nearly = free.text[half : half + 6], free.text[3:6] + "~never"
            sampling = {**SEEDED, "logprobs": 2, "stop": (stop, nearly)}
            stopped = await check(served, GenerateCall("stop", PROMPT, sampling, 16), cuts=16)
            assert (stopped.text, stopped.finish_reason) == (free.text[: free.text.find(stop)], "stop")
            held = await check(served, GenerateCall("held", PROMPT, {**sampling, "stop": (free.text[-3:] + "~",)}, 16))
            assert (held.text, held.finish_reason) == (free.text, "length")
            token = await check(served, GenerateCall("token", PROMPT, {**SEEDED, "stop_token_ids": (free.ids[9],)}, 16))
            assert token.ids == free.ids[: free.ids.index(free.ids[9]) + 1]
            ends = {"temperature": 0, "logit_bias": {tiny_models.EOS: 100.0}, "min_tokens": 9, "logprobs": 0}
            late = await check(served, GenerateCall("late", PROMPT, ends, 16))
            assert (late.counts, late.ids[-1], late.finish_reason) == (10, tiny_models.EOS, "stop")
            early = {**SEEDED, "stop": (free.text[1:3],), "min_tokens": 12}
            assert (await check(served, GenerateCall("early", PROMPT, early, 16))).counts >= 12

    asyncio.run(scenario())


def test_schemas_and_calls_are_followed_to_their_end() -> None:
    tokenizer = tiny_models.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool_call>", "</tool_call>"]})
    tokenizer.chat_template = tool_templates.HERMES
    asked = ({"role": "user", "content": "x"},)

    async def scenario() -> None:
        async with serving(tokenizer) as served:
            # it may prefer blanks to anything else
            blanks = {at: -60.0 for at in range(len(tokenizer)) if not tokenizer.decode([at]).strip()}
            drawn = {"temperature": 0.8, "seed": 3, "logprobs": 1, "logit_bias": blanks}
            value = await check(served, GenerateCall("v", asked, {**drawn, "json_schema": json.dumps(WORDS)}), cuts=13)
            assert set(json.loads(value.text)) == {"a", "b"}
            assert (value.finish_reason, value.text.isascii()) == ("stop", False)
            call = GenerateCall("c", asked, drawn, 100, tools=Tools((CALLED,), required=True))
            endless = {**drawn, "logit_bias": {**blanks, tiny_models.EOS: -100.0}}
            several = await check(served, replace(call, sampling=endless), cuts=5)
            assert set(several.names) == {"f"}
            assert len(several.calls) > 1
            assert all(set(json.loads(arguments)) == {"a", "b"} for _, arguments in several.calls[:-1])
            single = await check(served, replace(call, tools=Tools((CALLED,), required=True, parallel=False)), cuts=7)
            assert (len(single.calls), single.finish_reason) == (1, "tool_calls")

    asyncio.run(scenario())


@pytest.mark.parametrize("name", ["metaspace", "byte"])
def test_characters_and_spaces_across_the_cut(name: str) -> None:
    """Random bytes, few of which are characters: what is not whole is held back; spaces that a decoder drops."""
    tokenizer = tiny_models.metaspace_tokenizer() if name == "metaspace" else tiny_models.byte_tokenizer()

    async def scenario() -> None:
        async with serving(tokenizer) as served:
            for sampling in ({**SEEDED, "logprobs": 2}, {**SEEDED, "seed": 6, "stop": ("\ufffd\ufffd\ufffd", "é!")}):
                text = await check(served, GenerateCall("t", "the quick", sampling, 24), cuts=6)
                assert text.text
            echoed = await check(served, GenerateCall("e", "the quick", {**SEEDED, "logprobs": 1}, 6, echo=True))
            assert echoed.text.startswith("the quick")
            assert echoed.tokens[0][1] == 0

    asyncio.run(scenario())


def test_a_crowd_is_lost_and_goes_on_where_room_is_scarce() -> None:
    """Eight texts, all of them lost at once, at an engine where they have to give way to each other."""
    block = 2 * 2 * 2 * 32 * 16 * 4  # bytes: 2 layers, keys and values of 2 heads of 16 numbers, 32 tokens

    async def scenario() -> None:
        options = {"max_batch": 8, "prefill_tokens": 40, "cache_memory_bytes": 9 * block, "max_context": 200}
        async with serving(tiny_models.tokenizer(), **options) as served:
            calls = [
                GenerateCall(f"{at}", tuple(range(3 + at, 40 + at)), {**SEEDED, "seed": at, "logprobs": 1}, 50)
                for at in range(8)
            ]
            alone = [joined(await served.told(call)) for call in calls]
            begun = [text.ids[: 5 * at + 3] for at, text in enumerate(alone)]
            going_on = [replace(call, generated=ids) for call, ids in zip(calls, begun, strict=True)]

            async def rest(call: GenerateCall) -> Joined:
                return joined([message async for message in served.replicas[1].generate(call)])

            for text, whole, ids in zip(await asyncio.gather(*map(rest, going_on)), alone, begun, strict=True):
                assert ids + text.ids == whole.ids
                assert whole.text.endswith(text.text)
                assert text.logprobs == pytest.approx(whole.logprobs[-len(text.logprobs) :], abs=1e-5)
            assert served.engines[1].load().preemptions > 0

    asyncio.run(scenario())


def test_a_text_that_was_whole_ends_at_once() -> None:
    tokenizer = tiny_models.tokenizer()

    async def scenario() -> None:
        async with serving(tokenizer) as served:
            free = joined(await served.told(GenerateCall("free", PROMPT, SEEDED, 12)))
            ways: list[tuple[dict[str, Any], int, str]] = [
                (SEEDED, 12, "length"),
                ({**SEEDED, "stop": (free.text[4:9],)}, 99, "stop"),
                ({**SEEDED, "stop_token_ids": (free.ids[6],)}, 99, "stop"),
                ({"seed": 5, "json_schema": '{"enum": ["é漢字🎈"]}', "logprobs": 1}, 99, "stop"),
            ]
            for sampling, most, reason in ways:
                call = GenerateCall("w", PROMPT, sampling, most)
                whole = joined(await served.told(call))
                assert whole.finish_reason == reason
                rest = joined(await served.told(replace(call, generated=whole.ids)))
                assert (rest.ids, rest.counts, rest.finish_reason, rest.calls) == ((), whole.counts, reason, ())
                assert whole.text.endswith(rest.text)

    asyncio.run(scenario())


class Forgetful:
    """An engine of one's own that knows nothing of texts begun elsewhere."""

    max_context = 100

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def load(self) -> EngineLoad:
        return EngineLoad(0, 0, 0, 0, 0.0)


def test_an_engine_that_cannot_go_on_says_so() -> None:
    call = GenerateCall("r", (5, 6, 7), {}, 9, generated=(8, 9))

    async def scenario() -> None:
        tokenizer = tiny_models.tokenizer()
        own = GenerativeReplica(Forgetful(tokenizer), Identity("1", None), {})  # type: ignore[arg-type]  # what is used
        assert [_code(message) async for message in own.generate(call)] == [(503, "replica_lost")]
        async with serving(tokenizer, max_context=32) as served:
            long = replace(call, prompt=PROMPT[:20], generated=PROMPT[:13], max_tokens=None)  # begun with more room
            assert [_code(message) for message in await served.told(long)] == [(503, "replica_lost")]
            foreign = replace(call, generated=(5000,))
            assert [_code(message) for message in await served.told(foreign)][-1] == (400, "invalid_value")

    asyncio.run(scenario())


def _code(message: Message) -> tuple[int, str]:
    return (message.status, message.code) if isinstance(message, Refused) else (200, "")
