"""Two replicas over real engines, lost at tokens that a test names, and what a client of theirs was told."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest

from serve.engines.protocol import Delta, GenerationRequest
from serve.engines.replica import GenerativeReplica
from serve.engines.torch.torch_engine import TorchEngine, TorchEngineOptions
from serve.routing.lost import ReplicaLost
from serve.routing.resuming import Message, resumed
from serve.wire import Chunk, GenerateCall, Identity, Opened
from tests.support import tiny_models


class Mortal:
    """An engine that is lost before it tells of a token: of the number `dies_at[0]` first."""

    def __init__(self, engine: TorchEngine) -> None:
        self._engine = engine
        self.tokenizer, self.max_context = engine.tokenizer, engine.max_context
        self.start, self.stop, self.healthy, self.report = engine.start, engine.stop, engine.healthy, engine.report
        self.check, self.load, self.resumes = engine.check, engine.load, engine.resumes
        self.dies_at: list[int] = []

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        async with aclosing(self._engine.generate(request)) as deltas:
            async for delta in deltas:
                if self.dies_at and delta.completion_tokens >= self.dies_at[0]:
                    self.dies_at.pop(0)
                    raise ReplicaLost("one")
                yield delta


class Served:
    """Two replicas that can be lost, and texts from them."""

    def __init__(self, replicas: list[GenerativeReplica], engines: list[Mortal]) -> None:
        self.replicas, self.engines = replicas, engines
        self.tries = 0

    def dies_at(self, tokens: Sequence[int]) -> None:
        """Let one replica after the other be lost before its text has so many tokens."""
        self.tries = 0
        for at, engine in enumerate(self.engines):
            engine.dies_at = list(tokens[at :: len(self.engines)])

    async def told(self, call: GenerateCall, dies_at: Sequence[int] = ()) -> list[Message]:
        """Return a call's messages, where a replica is lost at each of these tokens."""
        self.dies_at(dies_at)
        messages = [message async for message in resumed(self.attempt, call)]
        assert [engine.dies_at for engine in self.engines] == [[], []]
        assert self.tries == len(dies_at) + 1
        return messages

    def attempt(self, call: GenerateCall, excluded: frozenset[str], build: str | None) -> AsyncGenerator[Message, None]:
        self.tries += 1
        return self.replicas[(self.tries - 1) % len(self.replicas)].generate(call)


@asynccontextmanager
async def serving(tokenizer: Any, **options: Any) -> AsyncIterator[Served]:
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": None, "bos_token_id": None}
    replicas, engines = [], []
    for _ in range(2):
        model = tiny_models.decoder("llama", 0, 0.2, vocab_size=len(tokenizer), max_position_embeddings=512, **special)
        engine = TorchEngine(model, tokenizer, TorchEngineOptions(threads=1, **{"runner": "torch", **options}))
        engines.append(Mortal(engine))
        replicas.append(GenerativeReplica(engines[-1], Identity("1", None), {}))
        await replicas[-1].start()
    try:
        yield Served(replicas, engines)
    finally:
        for replica in replicas:
            await replica.stop()


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


async def check(served: Served, call: GenerateCall, cuts: int = 4) -> Joined:
    """Compare a text with itself, lost once at each of some tokens and twice elsewhere; return the undisturbed one."""
    whole = joined(await served.told(call))
    last = whole.counts
    assert len(whole.ids) == last
    once = [[at] for at in sorted({*range(1, last + 1, -(-last // cuts)), last})]
    for dies_at in [*once, [last // 3 + 1, 2 * last // 3 + 1]]:
        again = joined(await served.told(call, dies_at))
        assert again.logprobs == pytest.approx(whole.logprobs, rel=1e-5, abs=1e-5), dies_at
        if again.finish_reason == "tool_calls":  # the engine may have been some tokens ahead of the end that was read
            again = replace(again, ids=(again.ids + whole.ids[len(again.ids) :])[:last], counts=last)
        assert replace(again, logprobs=()) == replace(whole, logprobs=()), dies_at
    return whole
