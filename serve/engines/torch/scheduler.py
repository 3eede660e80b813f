"""Decide which tokens run in the next step. Pure Python: no tensors, no clock, no thread.

    every sequence whose text is cached but for one token decodes, the oldest first
        no block left → the youngest gives all of its own back and waits again, first in the queue
    prompts under way go on, then waiting sequences are admitted, while the step has prompt tokens to spend
        a prompt that begins like a text in the cache shares its blocks and skips their tokens

Decoding sequences run in every step, so a long prompt holds nobody up for longer than its chunk takes. A sequence gets
the blocks of its whole prompt when it is admitted, and one more each time its text fills them.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from serve.engines.protocol import GenerationRequest
from serve.engines.torch.blocks import BLOCK, BlockPool, blocks_for, content_name

IDLE_FACTOR = 4
SCORED_TOKENS = 256
"""Prompt tokens of one step whose logits are all wanted: at a vocabulary of 150,000 they take 150 MB."""


@dataclass(eq=False)
class Sequence:
    """A request on its way: what it has, and how much of that the cache holds."""

    request: GenerationRequest
    max_tokens: int
    """The request's own limit, or what the context leaves."""
    context: Any = None
    """What belongs to other parts of the engine (sampler, consumer); the scheduler never looks at it."""
    tokens: list[int] = field(default_factory=list)
    """Prompt and completion."""
    cached: int = 0
    """Tokens whose keys and values are in the cache."""
    blocks: array[int] = field(default_factory=lambda: array("i"))
    """Where they are, BLOCK tokens each."""
    pooled: bool = False
    """Whether its hidden states make up an embedding, and no token is chosen."""
    names: list[bytes] = field(default_factory=list)
    """Names of the contents of the first blocks, as far as they were needed."""

    def __post_init__(self) -> None:
        self.tokens = list(self.given)

    @property
    def given(self) -> tuple[int, ...]:
        """The tokens that came with the request: the prompt, and what another engine has generated."""
        return self.request.prompt_token_ids + self.request.generated

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def completion_tokens(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    @property
    def uncached(self) -> int:
        return len(self.tokens) - self.cached

    @property
    def scored(self) -> bool:
        """Whether the logits of every token that came with the request are wanted still."""
        request = self.request
        wanted = request.params.logprobs is not None if request.generated else request.params.prompt_logprobs
        return wanted and self.completion_tokens == len(request.generated)

    @property
    def read_whole(self) -> bool:
        """Whether something is wanted of every token that came, so that none of them may be skipped."""
        return self.pooled or self.scored

    def name(self, block: int) -> bytes:
        """Return the name of the content of the sequence's full block number `block`."""
        while len(self.names) <= block:
            at = len(self.names)
            before = self.names[-1] if self.names else b""
            self.names.append(content_name(before, self.tokens[at * BLOCK : (at + 1) * BLOCK]))
        return self.names[block]


class Chunk(NamedTuple):
    """Tokens [start, end) of a sequence, to be run in one step."""

    sequence: Sequence
    start: int
    end: int
    completes: bool
    """Whether the step yields the sequence's next token."""


class Step(NamedTuple):
    """One forward pass: one token for each decoding sequence, then chunks of prompts."""

    decode: list[Chunk]
    prefill: list[Chunk]

    @property
    def chunks(self) -> list[Chunk]:
        return self.decode + self.prefill


class Scheduler:
    """First come, first served; `max_running` sequences at once over the blocks of `pool`."""

    def __init__(self, pool: BlockPool, max_running: int, prefill_tokens: int, longest_stall_s: float = 1e9) -> None:
        self.pool = pool
        self.max_running = max_running
        self.most_prefill_tokens = prefill_tokens
        self.prefill_tokens = prefill_tokens
        """Prompt tokens of one step while streams run; IDLE_FACTOR times as many when none waits for its next token."""
        self.longest_stall_s = longest_stall_s
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """In the order of their admission."""
        self.preemptions = 0
        self.reused_tokens = 0
        """Prompt tokens that were found in the cache."""

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def next_step(self) -> Step | None:
        """Return the next step's work, admitting waiting sequences; None when there is nothing to do."""
        preempted = self.preemptions
        decode = list(self._decoding())
        budget = self.prefill_tokens if decode else self.prefill_tokens * IDLE_FACTOR
        scored = SCORED_TOKENS
        prefill = []
        for sequence in self._reading(admit=self.preemptions == preempted):
            count = min(sequence.uncached, budget, scored if sequence.scored else budget)
            if count:
                prefill.append(self._chunk(sequence, count))
            budget -= count
            scored -= count if sequence.scored else 0
            if budget == 0:
                break
        return Step(decode, prefill) if decode or prefill else None

    def ran(self, step: Step) -> None:
        """Record that the step's tokens are in the cache; call it before the new tokens are appended."""
        for chunk in step.decode:
            chunk.sequence.cached = chunk.end
        for chunk in step.prefill:
            chunk.sequence.cached = chunk.end

    def observe_step_time(self, step: Step, seconds: float) -> None:
        """Fit the prompt tokens of a step to how long they take, so that they hold no stream up for too long."""
        tokens = len(step.decode) + sum(chunk.end - chunk.start for chunk in step.prefill)
        if tokens - len(step.decode) >= BLOCK:
            fitting = int(self.longest_stall_s * tokens / seconds)
            wanted = (self.prefill_tokens + fitting) // 2  # one slow step says little
            self.prefill_tokens = min(self.most_prefill_tokens, max(BLOCK, wanted))

    def remove(self, sequence: Sequence) -> None:
        """Take a finished, cancelled or failed sequence out and free its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._give_back(sequence)
        else:
            self.waiting.remove(sequence)

    def _decoding(self) -> Iterator[Chunk]:
        at = 0
        while at < len(self.running):  # preemption shortens it from behind
            sequence = self.running[at]
            if sequence.uncached == 1 and self._has_room(sequence):
                yield self._chunk(sequence, 1)
            at += 1

    def _has_room(self, sequence: Sequence) -> bool:
        """Make sure that the next token has a place, if need be at the cost of the youngest sequence."""
        while len(sequence.blocks) * BLOCK < len(sequence.tokens):
            if self.pool.available:
                sequence.blocks.append(self.pool.take())
                continue
            youngest = self.running.pop()
            self._give_back(youngest)
            self.waiting.appendleft(youngest)
            self.preemptions += 1
            if youngest is sequence:
                return False
        return True

    def _reading(self, admit: bool) -> Iterator[Sequence]:
        """Give the sequences with more than one token to cache: those under way, then those that can be admitted."""
        for sequence in self.running:
            if sequence.uncached > 1:
                yield sequence
        while admit and self.waiting and len(self.running) < self.max_running and self._admit(self.waiting[0]):
            self.running.append(self.waiting.popleft())
            yield self.running[-1]

    def _admit(self, sequence: Sequence) -> bool:
        """Give a sequence the blocks of its whole text, sharing those that exist; False when there are too few.

        A block for each running sequence is left over, so that it need not give way at once.
        """
        shared = list(self._prefix(sequence))
        needed = blocks_for(len(sequence.tokens)) - len(shared)
        idle = sum(map(self.pool.is_idle, shared))
        if self.pool.available - idle - needed < len(self.running):
            return False
        for block in shared:
            self.pool.share(block)
        sequence.blocks.extend(shared)
        sequence.blocks.extend(self.pool.take() for _ in range(needed))
        sequence.cached = len(shared) * BLOCK
        self.reused_tokens += sequence.cached
        return True

    def _prefix(self, sequence: Sequence) -> Iterator[int]:
        """Give the blocks of the cache that the text begins with; at least its last token is left to be run."""
        for at in range(0 if sequence.read_whole else (len(sequence.tokens) - 1) // BLOCK):
            block = self.pool.find(sequence.name(at))
            if block is None:
                return
            yield block

    def _chunk(self, sequence: Sequence, count: int) -> Chunk:
        """Return the sequence's next `count` tokens, and publish the blocks they fill.

        At once, not after the step: a sequence that is admitted to the same step may share them, because a layer
        writes all keys and values before it attends.
        """
        start, end = sequence.cached, sequence.cached + count
        for at in range(start // BLOCK, end // BLOCK):
            self.pool.publish(sequence.blocks[at], sequence.name(at))
        return Chunk(sequence, start, end, end == len(sequence.tokens))

    def _give_back(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks = array("i")
        sequence.cached = 0
