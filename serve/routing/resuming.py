"""A stream that outlives its replica: another one goes on with the text, without a gap and without a repeat.

    resumed(attempt, call)
        attempt(call)  →  Opened, chunks …  ReplicaLost
        attempt(the call with the tokens that were handed on, the lost replica left out, the same build)
                       →  Opened (kept back), chunks …  the last one, with a finish reason

Every call has a seed, so that what the second replica draws is what the first one would have drawn. In fp32 the text is
the undisturbed one; in bf16 other batches round otherwise, and a text may go on in other words, as it may at one
replica. Nothing of Ray and nothing of HTTP.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Protocol

from serve.routing.lost import ReplicaLost
from serve.wire import Chunk, GenerateCall, Identity, Opened, Refused

Message = Opened | Chunk | Refused
MOST_FRUITLESS = 2
"""Replicas that may be lost one after another without a token in between: a request that itself ends replicas ends no
more than so many."""
MOST_LOST = 5
"""Replicas that may be lost under one request in all."""
SEED_BITS = 62
"""Of the seeds that are drawn for calls without one: every engine takes them as they are."""


class Attempt(Protocol):
    """One way to a replica; closing what it returns frees the replica's slot."""

    def __call__(
        self, call: GenerateCall, excluded: frozenset[str], build: str | None
    ) -> AsyncGenerator[Message, None]:
        """Stream a call from a replica: Opened and chunks, or Refused.

        Args:
            excluded: ids of the replicas that it must not be: this call was lost with them or sent away by them.
            build: what it must be a replica of (`Identity.build`); None: any.

        Raises:
            ReplicaLost: the replica or the way to it was lost, or it sent the call away.
        """
        ...


def seeded(call: GenerateCall, seed: int) -> GenerateCall:
    """Return the call with this seed, where the client named none and the text is drawn at all."""
    named = call.sampling.get("seed") is not None or call.sampling.get("temperature") == 0
    return call if named else replace(call, sampling={**call.sampling, "seed": seed})


async def resumed(
    attempt: Attempt, call: GenerateCall, went_on: Callable[[], None] = lambda: None, build: str | None = None
) -> AsyncGenerator[Message, None]:
    """Stream a call from as many replicas as it takes; see the module. It does not raise ReplicaLost.

    Args:
        went_on: called each time that a text which had begun is asked of another replica.
        build: what the first one must be a replica of already; None: any.
    """
    progress = Progress(seeded(call, secrets.randbits(SEED_BITS)), build)
    while not progress.ended:
        try:
            tried = attempt(progress.call, frozenset(progress.excluded), progress.build)
            async with aclosing(tried) as messages:
                async for message in messages:
                    handed_on = progress.take(message)
                    if handed_on is not None:
                        yield handed_on
                    if progress.refused:
                        return
            return
        except ReplicaLost as lost:
            refusal = progress.lose(lost)
            if refusal is not None:
                yield refusal
            elif progress.begun:
                went_on()


class Progress:
    """What the client has of one text, and what follows from the loss of a replica. Pure."""

    def __init__(self, call: GenerateCall, build: str | None = None) -> None:
        self._call, self._build = call, build
        self._identity: Identity | None = None
        self._ids: list[int] = []
        self._counted = True
        """Whether the tokens handed on are known, one by one: only then another replica can go on after them."""
        self._lost = self._fruitless = 0
        self.excluded: set[str] = set()
        """Replicas that had the call and have it no more."""
        self.ended = self.refused = False
        """Whether nothing more may be handed on; whether that is because the text cannot be gone on with."""

    @property
    def call(self) -> GenerateCall:
        """What the next attempt is asked."""
        return replace(self._call, generated=(*self._call.generated, *self._ids))

    @property
    def begun(self) -> bool:
        """Whether a replica had accepted it."""
        return self._identity is not None

    @property
    def build(self) -> str | None:
        """What the next attempt must be of: an answer is of one build from its first byte, the headers, on."""
        return self._build if self._identity is None else self._identity.build

    def take(self, message: Message) -> Message | None:
        """Note a message; return what is to be handed on to the client."""
        if self.ended:
            return None
        if isinstance(message, Opened):
            return self._open(message)
        if isinstance(message, Refused):
            self.ended = True
            return message
        return self._go_on(message)

    def lose(self, lost: ReplicaLost) -> Refused | None:
        """Note a loss; return what the client is told where the text ends with it.

        An engine that fails is a loss like that of its replica: the request itself may be sound.
        """
        if self.ended:
            return None
        self.excluded.add(lost.replica_id)
        if not lost.moved:
            self._lost += 1
            self._fruitless += 1
        said = None
        if not self._counted:
            said = "the replica that worked on this request was lost, and did not tell its tokens"
        elif self._fruitless >= MOST_FRUITLESS or self._lost >= MOST_LOST:
            said = f"{self._lost} replicas were lost while they worked on this request"
        if said is None:
            return None
        told = self._refused(said)
        return told if lost.refused is None else lost.refused

    def _open(self, opened: Opened) -> Opened | Refused | None:
        if self._identity is None:
            self._identity = opened.identity
            return opened
        if opened.identity != self._identity:
            here, there = self._identity.version, opened.identity.version
            other = f"version {there}" if here != there else "that version with other settings"
            return self._refused(f"the replica of version {here} was lost, and there is only {other} now")
        return None

    def _go_on(self, chunk: Chunk) -> Chunk | Refused:
        expected = len(self._call.generated) + len(self._ids) + len(chunk.ids)
        counted = chunk.completion_tokens == expected and (bool(chunk.ids) or bool(self._ids) or not chunk.text)
        if not counted and self.excluded and self._ids:  # it began anew: the client would read the beginning twice
            return self._refused("the replica that worked on this request was lost, and the next one did not go on")
        self._counted = self._counted and counted
        self._ids += chunk.ids
        self._fruitless = 0 if chunk.ids else self._fruitless
        self.ended = chunk.finish_reason is not None
        return chunk

    def _refused(self, message: str) -> Refused:
        self.ended = self.refused = True
        return Refused(503, message, "replica_lost")
