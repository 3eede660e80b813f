"""What a step's logits mean for its sequences: tokens chosen, prompts scored, texts ended."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from serve.engines.protocol import EngineError, FinishReason, RequestError, SamplingParams, TokenLogprobs
from serve.engines.step_thread import Listener
from serve.engines.torch import logprobs
from serve.engines.torch.sampler import RequestSampler, choose
from serve.engines.torch.scheduler import Chunk, Sequence, Step


class Chosen(NamedTuple):
    """A token was chosen, or what came with the request was scored and none was wanted."""

    token: int | None
    finish_reason: FinishReason | None
    shown: bool
    """Whether the token is part of the text; the one that ends it is not."""
    logprobs: TokenLogprobs | None
    given_logprobs: tuple[TokenLogprobs, ...]
    """Of the tokens that came with the request, where they are wanted; once."""


Event = Chosen | EngineError | RequestError


@dataclass(eq=False)
class Completion:
    """What a sequence needs beside its tokens: how to choose the next one, and who listens."""

    sampler: RequestSampler
    loop: asyncio.AbstractEventLoop
    events: deque[Event] = field(default_factory=deque)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    given_logprobs: list[TokenLogprobs] = field(default_factory=list)
    over: FinishReason | None = None
    """Why no token is wanted: the text ended with what came with the request."""
    closed: bool = False
    """The last event was sent or nobody listens any more."""


async def events(listener: Listener) -> AsyncIterator[Any]:
    """Give what is said of a sequence, as it comes. Raises the error that ends it."""
    while True:
        await listener.arrived.wait()
        listener.arrived.clear()
        while listener.events:
            event = listener.events.popleft()
            if isinstance(event, Exception):
                raise event
            yield event


@torch.inference_mode()
def advance(step: Step, logits: torch.Tensor, eos: frozenset[int]) -> list[tuple[Sequence, Event]]:
    """Choose the next token of every sequence that completes, append it, and return what to say of each.

    Args:
        logits: [L, vocab], of the rows that `batch.build` asked for in this step, in their order.
    """
    chunks = [chunk for chunk in step.chunks if not chunk.sequence.pooled]
    if any(chunk.sequence.scored for chunk in chunks):
        logits = _score(chunks, logits)
    completing = [chunk.sequence for chunk in chunks if chunk.completes]
    if not completing:
        return []
    tokens = choose(logits, [sequence.context.sampler for sequence in completing])
    reported = _report(completing, tokens, logits)
    return [
        (sequence, _accept(sequence, token, reported.get(sequence), eos))
        for sequence, token in zip(completing, tokens, strict=True)
    ]


def _accept(sequence: Sequence, token: int | None, reported: TokenLogprobs | None, eos: frozenset[int]) -> Event:
    """Append a token to its sequence and return what to say of it."""
    if token is None:
        return EngineError("the model produced logits that are not finite")
    constraint = sequence.context.sampler.constraint
    if constraint is not None and constraint.failure is not None:  # its text would look whole
        field = "response_format" if sequence.request.params.grammar is None else "tools"
        return RequestError(field, "this schema cannot be followed to the end of a text: it is too complex")
    scored = tuple(sequence.context.given_logprobs)
    sequence.context.given_logprobs = []
    if sequence.context.over is not None:
        return Chosen(None, sequence.context.over, False, None, scored)
    sequence.tokens.append(token)
    return Chosen(
        token, finish_reason(sequence, eos), not is_end(token, sequence.request.params, eos), reported, scored
    )


def is_end(token: int, params: SamplingParams, eos: frozenset[int]) -> bool:
    """Say whether a token ends the text and is no part of it."""
    return (token in eos and not params.ignore_eos) or token in params.stop_token_ids


def finish_reason(sequence: Sequence, eos: frozenset[int]) -> FinishReason | None:
    """Return why the text ends with the last token of a sequence, if it does; its stop strings are not looked at."""
    if sequence.completion_tokens and is_end(sequence.tokens[-1], sequence.request.params, eos):
        return "stop"
    constraint = sequence.context.sampler.constraint
    if constraint is not None and constraint.complete:
        return "stop"
    return "length" if sequence.completion_tokens >= sequence.max_tokens else None


def _score(chunks: list[Chunk], logits: torch.Tensor) -> torch.Tensor:
    """Note the log-probabilities of given tokens where wanted; return the logits of the completing rows alone."""
    last_rows, first = [], 0
    for chunk in chunks:
        sequence = chunk.sequence
        count = chunk.end - chunk.start if sequence.scored else int(chunk.completes)
        if sequence.scored:
            _score_chunk(sequence, chunk.start, logits[first : first + count])
        first += count
        if chunk.completes:
            last_rows.append(first - 1)
    return logits[last_rows]


def _score_chunk(sequence: Sequence, start: int, logits: torch.Tensor) -> None:
    """Note the log-probabilities of the given tokens that follow those at `start` and on."""
    told, given = sequence.context.given_logprobs, sequence.given
    if start == 0:
        told[:] = [TokenLogprobs(given[0], None, ())]  # it may have given way in the middle and begin again
    following = given[start + 1 : start + 1 + len(logits)]
    if following:
        alternatives = [sequence.request.params.logprobs or 0] * len(following)
        told += logprobs.report(logits[: len(following)], following, alternatives)


def _report(sequences: list[Sequence], tokens: list[int | None], logits: torch.Tensor) -> dict[Sequence, TokenLogprobs]:
    """Return the log-probabilities of the chosen tokens for those who asked."""
    wanted = [
        (row, token, sequence.request.params.logprobs)
        for row, (sequence, token) in enumerate(zip(sequences, tokens, strict=True))
        if sequence.request.params.logprobs is not None and token is not None
    ]
    if not wanted:
        return {}
    rows, chosen, alternatives = zip(*wanted, strict=True)
    reports = logprobs.report(logits[list(rows)], chosen, alternatives)
    return {sequences[row]: report for row, report in zip(rows, reports, strict=True)}
