"""A replica's spans: one for each call, below the gateway's, and below that what the engine did for it.

    text_completion chat          the call, from its arrival to its last message
        engine.queue              handed to the engine → its first step begins
        engine.prefill            → its first token
        engine.decode             → its last token

Predictions and embeddings have `engine.compute` in place of the last two. An engine that notes nothing (vLLM, some of
the user's own) has the call's span alone. Names are those of OpenTelemetry's conventions where it has one.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from serve.engines import stats
from serve.engines.stats import RequestStats
from serve.wire import Chunk, EmbedCall, GenerateCall, InferCall, Inferred, Opened, Refused, Vectors

if TYPE_CHECKING:
    from serve.channel.server import Answer, Call
    from serve.tracing.spans import Span, Spans

PARAMETERS = ("temperature", "top_p", "top_k", "frequency_penalty", "presence_penalty", "seed")
"""Of what a client may ask for: numbers, nothing of a text."""


class CallSpans:
    """Makes the spans of one replica's calls."""

    def __init__(self, spans: Spans, model: str) -> None:
        self._spans, self._model = spans, model

    async def traced(self, answer: Answer, call: Any) -> AsyncGenerator[Any, None]:
        """Yield what a call is answered with, within its span."""
        with self._spans.span(f"{operation(call)} {self._model}", call.trace, call.trace_state) as span:
            seen, noted = Seen(), stats.begin() if span.is_recorded else None
            try:
                async with aclosing(answer(call)) as messages:
                    async for message in messages:
                        seen.take(message)
                        yield message
                seen.whole = True
            finally:
                stats.over()
                if noted is not None:
                    self._tell(span, call, seen, noted)

    def _tell(self, span: Span, call: Call, seen: Seen, noted: RequestStats) -> None:
        ended = time.perf_counter()
        span.note({"gen_ai.operation.name": operation(call), "gen_ai.provider.name": "tandem"})
        span.note({"gen_ai.request.model": self._model, "tandem.request_id": call.request_id})
        span.note({**seen.attributes(call), **_work(noted, has_tokens=not isinstance(call, InferCall))})
        if seen.version is not None:  # what was asked for is valid
            span.note({**asked(call), "gen_ai.response.model": f"{self._model}@{seen.version}"})
        if seen.refused is not None and seen.refused.status >= 500:
            span.failed(seen.refused.code)
        for part in parts(noted, isinstance(call, GenerateCall), ended):
            span.part(*part)


@dataclass
class Seen:
    """What a call's messages say of it."""

    began: float = 0.0
    first: float | None = None
    version: str | None = None
    prompt_tokens: int | None = None
    generated: int | None = None
    reason: str | None = None
    rows: int | None = None
    dimensions: int | None = None
    refused: Refused | None = None
    whole: bool = False
    """Whether all of it was taken: a client that leaves, and a replica that does, end a call before."""

    def __post_init__(self) -> None:
        self.began = time.perf_counter()

    def take(self, message: Any) -> None:
        """Note a message."""
        if isinstance(message, Chunk):
            self.first = self.first or time.perf_counter()
            self.generated, self.reason = message.completion_tokens, message.finish_reason
        elif isinstance(message, Refused):
            self.refused = message
        elif isinstance(message, Opened | Inferred | Vectors):
            self.version = message.identity.version
            self.prompt_tokens = getattr(message, "prompt_tokens", None)
        if isinstance(message, Inferred):
            self.rows = len(message.predictions)
        elif isinstance(message, Vectors):
            self.rows, self.dimensions = message.values.shape

    def attributes(self, call: Call) -> dict[str, Any]:
        """Name it. The tokens that another replica has generated for this answer are that one's."""
        before = len(call.generated) if isinstance(call, GenerateCall) else 0
        return {
            "gen_ai.usage.input_tokens": self.prompt_tokens,
            "gen_ai.usage.output_tokens": None if self.generated is None else self.generated - before,
            "gen_ai.response.finish_reasons": None if self.reason is None else [self.reason],
            "gen_ai.response.time_to_first_chunk": None if self.first is None else self.first - self.began,
            "gen_ai.embeddings.dimension.count": self.dimensions,
            "tandem.rows": self.rows,
            "tandem.resumed_after_tokens": before or None,
            "tandem.cancelled": None if self.whole else True,
            "error.type": None if self.refused is None else self.refused.code,
        }


def operation(call: Call) -> str:
    """Return what a call asks for, in OpenTelemetry's words where it has one."""
    if isinstance(call, EmbedCall):
        return "embeddings"
    if isinstance(call, InferCall):
        return "infer"
    return "chat" if call.prompt and isinstance(call.prompt[0], dict) else "text_completion"


def asked(call: Call) -> dict[str, Any]:
    """Name what was asked for: numbers alone, nothing of the prompt, of stop strings or of a schema. Pure."""
    if not isinstance(call, GenerateCall):
        return {}
    named = {f"gen_ai.request.{name}": call.sampling.get(name) for name in PARAMETERS}
    return {"gen_ai.request.max_tokens": call.max_tokens, **named}


def _work(noted: RequestStats, has_tokens: bool) -> dict[str, Any]:
    if noted.submitted is None:  # the engine tells nothing
        return {}
    of_tokens = {
        "tandem.engine.preemptions": noted.preemptions,
        "gen_ai.usage.cache_read.input_tokens": noted.cached_tokens,
    }
    return {"tandem.engine.steps": noted.steps, **(of_tokens if has_tokens else {})}


class Part(NamedTuple):
    """A time within a call."""

    name: str
    began: float
    ended: float
    attributes: dict[str, Any]


def parts(noted: RequestStats, generates: bool, ended: float) -> Iterator[Part]:
    """Give what the engine's work on a call was made of; where it came to no end, until the call `ended`. Pure."""
    if noted.submitted is None:
        return
    scheduled, first, last = (
        ended if each is None else min(each, ended) for each in (noted.scheduled, noted.first_output, noted.last_output)
    )
    yield Part("engine.queue", noted.submitted, scheduled, {})
    if noted.scheduled is None:
        return
    if not generates:
        yield Part("engine.compute", scheduled, last, {"tandem.engine.steps": noted.steps})
        return
    to_first = noted.steps_to_first or noted.steps
    yield Part("engine.prefill", scheduled, first, {"tandem.engine.steps": to_first})
    if noted.steps > to_first:
        yield Part("engine.decode", first, last, {"tandem.engine.steps": noted.steps - to_first})
