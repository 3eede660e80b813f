"""A text whose replica is lost, at any token, goes on at another replica as if nothing had been."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from serve.engines.protocol import Delta, EngineLoad, GenerationRequest
from serve.engines.replica import GenerativeReplica
from serve.engines.torch.torch_engine import TorchEngine, TorchEngineOptions
from serve.routing.lost import ReplicaLost
from serve.routing.resuming import Message, resumed
from serve.wire import Chunk, GenerateCall, Identity, Opened, Refused, Tools
from tests.support import tiny_models, tool_templates

WORDS = {
    "type": "object",
    "properties": {"a": {"enum": ["é漢字🎈", "ñ🎈🎈"]}, "b": {"enum": [1, 22]}},
    "required": ["a", "b"],
}
CALLED = {"name": "f", "description": "", "parameters": WORDS}
SEEDED = {"temperature": 0.9, "seed": 5, "ignore_eos": True}
PROMPT = tuple(range(5, 45))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Mortal:
    """An engine that is lost before it tells of a token: of the number `dies_at[0]` first."""

    def __init__(self, engine: TorchEngine) -> None:
        self._engine = engine
        self.tokenizer, self.max_context = engine.tokenizer, engine.max_context
        self.check, self.load, self.resumes = engine.check, engine.load, engine.resumes
        self.dies_at: list[int] = []
        self.read: list[int] = []
        """Tokens that each request began with."""

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        self.read.append(len(request.prompt_token_ids + request.generated))
        async with aclosing(self._engine.generate(request)) as deltas:
            async for delta in deltas:
                if self.dies_at and delta.completion_tokens >= self.dies_at[0]:
                    self.dies_at.pop(0)
                    raise ReplicaLost("one")
                yield delta


@dataclass
class Served:
    """A replica that can be lost, and texts from it."""

    replica: GenerativeReplica
    engine: Mortal

    async def told(self, call: GenerateCall, dies_at: Sequence[int] = ()) -> list[Message]:
        """Return a call's messages, where a replica is lost at each of these tokens."""
        self.engine.dies_at = list(dies_at)
        messages = [message async for message in resumed(self._attempt, call)]
        assert self.engine.dies_at == []
        return messages

    def _attempt(
        self, call: GenerateCall, excluded: frozenset[str], version: str | None
    ) -> AsyncGenerator[Message, None]:
        return self.replica.generate(call)


@asynccontextmanager
async def serving(tokenizer: Any, **options: Any) -> AsyncIterator[Served]:
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": None, "bos_token_id": None}
    model = tiny_models.decoder("llama", 0, 0.2, vocab_size=len(tokenizer), max_position_embeddings=512, **special)
    engine = TorchEngine(model, tokenizer, TorchEngineOptions(threads=1, **{"runner": "torch", **options}))
    mortal = Mortal(engine)
    replica = GenerativeReplica(mortal, Identity("1", None), {})  # type: ignore[arg-type]  # what the test needs of one
    await engine.start()
    try:
        yield Served(replica, mortal)
    finally:
        await engine.stop()


@dataclass(frozen=True)
class Joined:
    """All that a client was told."""

    opened: Opened
    text: str
    ids: tuple[int, ...]
    counts: int
    finish_reason: str | None
    calls: tuple[tuple[int, str], ...]
    names: tuple[str, ...]
    tokens: tuple[tuple[bytes, int], ...]
    """Of the log-probabilities: bytes and offset, and the best tokens' bytes."""
    logprobs: tuple[float, ...]


def joined(messages: list[Message]) -> Joined:
    opened, *rest = messages
    assert isinstance(opened, Opened), messages
    chunks = [message for message in rest if isinstance(message, Chunk)]
    assert len(chunks) == len(rest), messages
    arguments: dict[int, str] = {}
    pieces = [piece for chunk in chunks for piece in chunk.calls]
    for piece in pieces:
        arguments[piece.number] = arguments.get(piece.number, "") + piece.arguments
    tokens = [token for chunk in chunks for token in chunk.tokens]
    values = [[token.logprob, *(value for _, value in token.top)] for token in tokens]
    return Joined(
        opened,
        "".join(chunk.text for chunk in chunks),
        tuple(token for chunk in chunks for token in chunk.ids),
        chunks[-1].completion_tokens,
        chunks[-1].finish_reason,
        tuple(arguments.items()),
        tuple(piece.name for piece in pieces if piece.name is not None),
        tuple((raw, token.offset) for token in tokens for raw in (token.raw, *(best for best, _ in token.top))),
        tuple(-1.0 if value is None else value for row in values for value in row),
    )


async def check(served: Served, call: GenerateCall, cuts: int = 8) -> Joined:
    """Compare a text with itself, lost once at each of some tokens and twice elsewhere; return the undisturbed one."""
    whole = joined(await served.told(call))
    assert len(whole.ids) == whole.counts
    last = whole.counts
    once = [[at] for at in sorted({*range(1, last + 1, max(1, last // cuts)), last})]
    for dies_at in [*once, [last // 3 + 1, 2 * last // 3 + 1], [last // 2 + 1, last // 2 + 2]]:
        if dies_at[-1] > last:
            continue
        again = joined(await served.told(call, dies_at))
        assert again.logprobs == pytest.approx(whole.logprobs, abs=1e-5), dies_at
        assert replace(again, logprobs=()) == replace(whole, logprobs=()), dies_at
    return whole


SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0, "ignore_eos": True},
    "seeded": SEEDED,
    "top_p": {**SEEDED, "top_p": 0.8},
    "top_k, min_p": {**SEEDED, "top_k": 20, "min_p": 0.01},
    "penalties": {
        **{**SEEDED, "temperature": 0.3},
        **{"presence_penalty": 1.5, "frequency_penalty": 1.0, "repetition_penalty": 1.3},
    },
    "greedy with penalties": {"temperature": 0, "frequency_penalty": 2.0, "ignore_eos": True},
    "logit_bias": {**SEEDED, "logit_bias": {40: 8.0, 41: 8.0, 42: -100.0}},
    "logprobs": {**SEEDED, "logprobs": 3},
    "no seed": {"temperature": 1.0, "seed": 2**61 + 3, "ignore_eos": True},
}


def test_texts_go_on_as_they_were_drawn() -> None:
    async def scenario() -> None:
        async with serving(tiny_models.tokenizer()) as served:
            texts = {}
            for name, sampling in SAMPLINGS.items():
                texts[name] = await check(served, GenerateCall(name, PROMPT, sampling, 24))
                assert texts[name].finish_reason == "length", name
            assert len({text.ids for text in texts.values()}) == len(texts) - 1  # log-probabilities change no text
            assert len(texts["logprobs"].logprobs) == 24 * 4

    asyncio.run(scenario())
