"""Decide which tokens run in the next step. Pure Python: no tensors, no clock, no thread.

A sequence waits in a FIFO queue, takes a slot, has its prompt cached chunk by chunk, then decodes one token a step.
The rows of `running` are the cache's slots, in this order:

    decoding sequences ... | at most one sequence in the middle of its prompt | free slots

A waiting sequence is admitted only while the step still has prompt tokens to spend, so no second prompt is ever
begun before the first is finished. When a row leaves, the last decoding row and then the half-read prompt fill the
holes: two copies at most, and a decode step reads the first slots as one block.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from serve.engine import GenerationRequest


@dataclass(eq=False)
class Sequence:
    """A request on its way: what it has, and how much of that the cache holds."""

    request: GenerationRequest
    max_tokens: int
    """The request's own limit, or what the context leaves."""
    context: Any = None
    """What belongs to other parts of the engine (sampler, text, consumer); the scheduler never looks at it."""
    tokens: list[int] = field(default_factory=list)
    """Prompt and completion."""
    cached: int = 0
    """Tokens whose keys and values are in the cache."""

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt_token_ids)

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def completion_tokens(self) -> int:
        return len(self.tokens) - self.prompt_tokens


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, end) of the sequence in `slot`, to be run in one step."""

    sequence: Sequence
    slot: int
    start: int
    end: int

    @property
    def completes(self) -> bool:
        """Whether the step yields the sequence's next token."""
        return self.end == len(self.sequence.tokens)


@dataclass(frozen=True)
class Step:
    """One forward pass: one token for each decoding row, in slot order, then chunks of prompts."""

    decode: tuple[Chunk, ...]
    prefill: tuple[Chunk, ...]

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        return self.decode + self.prefill

    @property
    def completing(self) -> tuple[Chunk, ...]:
        """The chunks that yield a token, in the order of their logits."""
        return tuple(chunk for chunk in self.chunks if chunk.completes)


@dataclass(frozen=True)
class Move:
    """Copy `length` cached tokens from one slot to another."""

    source: int
    target: int
    length: int


class Scheduler:
    """FIFO admission to a fixed number of slots, with a bounded number of prompt tokens in each step."""

    def __init__(self, slots: int, prefill_tokens: int) -> None:
        self.slots = slots
        self.prefill_tokens = prefill_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.decoding = 0
        """How many of the first rows have their whole prompt in the cache."""

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def next_step(self) -> Step | None:
        """Return the next step's work, admitting waiting sequences; None when there is nothing to do."""
        decode = tuple(Chunk(s, i, s.cached, len(s.tokens)) for i, s in enumerate(self.running[: self.decoding]))
        prefill: list[Chunk] = []
        budget = self.prefill_tokens
        slot = self.decoding
        while budget > 0 and self._occupy(slot):
            sequence = self.running[slot]
            end = min(len(sequence.tokens), sequence.cached + budget)
            prefill.append(Chunk(sequence, slot, sequence.cached, end))
            budget -= end - sequence.cached
            slot += 1
        return Step(decode, tuple(prefill)) if decode or prefill else None

    def _occupy(self, slot: int) -> bool:
        """Make sure that a sequence holds `slot`, if any waits."""
        if slot == len(self.running) and slot < self.slots and self.waiting:
            self.running.append(self.waiting.popleft())
        return slot < len(self.running)

    def ran(self, step: Step) -> None:
        """Record that the step's tokens are in the cache; call it before the new tokens are appended."""
        for chunk in step.chunks:
            chunk.sequence.cached = chunk.end
        self.decoding += sum(chunk.completes for chunk in step.prefill)

    def remove(self, sequence: Sequence) -> list[Move]:
        """Take a finished, cancelled or failed sequence out; return the copies that close its hole, in order."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
            return []
        hole = self.running.index(sequence)
        moves: list[Move] = []
        if hole < self.decoding:
            self.decoding -= 1
            hole = self._fill(hole, self.decoding, moves)
        self._fill(hole, len(self.running) - 1, moves)
        self.running.pop()
        return moves

    def _fill(self, hole: int, source: int, moves: list[Move]) -> int:
        """Move the row at `source` into `hole`; return where the hole is then."""
        if hole != source:
            self.running[hole] = self.running[source]
            moves.append(Move(source, hole, self.running[hole].cached))
        return source

    @property
    def cached_tokens(self) -> int:
        return sum(sequence.cached for sequence in self.running)
