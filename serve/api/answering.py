"""One generated answer: its texts are opened together, counted, and sent in a form.

An answer is of one version from its first byte, the headers, on. As long as none was sent, it may be given anew by
another version: where the replica that worked on it is lost, or has to leave, and `serve up` has left none like it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from fastapi.responses import JSONResponse, Response

from serve.api.admission import Ticket
from serve.api.events import EventStream
from serve.api.openai_api import Generation
from serve.api.streaming import Form, OtherVersion, Stream, close_all, open_all
from serve.front import cuts, exchange
from serve.wire import GenerateCall, Identity, Opened

EVENT_STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
Forms = Callable[[str], Form]
"""Makes the form of an answer of the model and version that it is given, `name@version`."""


class Generates(Protocol):
    """Where texts come from."""

    def generate(self, model: str, call: GenerateCall, build: str | None = None) -> Stream:
        """Stream one text; `build`: what replicas it must be of (`Identity.build`), None: any."""
        ...


async def answered(backend: Generates, model: str, generation: Generation, ticket: Ticket, form: Forms) -> Response:
    """Return the answer, whole or as a stream of events, which has begun then. Raises ApiError."""
    counted = Counted(ticket)
    try:
        return await _answer(backend, model, generation, counted, form)
    except OtherVersion:
        counted.begin_anew()
        return await _answer(backend, model, generation, counted, form)


async def _answer(backend: Generates, model: str, generation: Generation, counted: Counted, form: Forms) -> Response:
    calls = [replace(call, **exchange.current().carried) for call in generation.calls]
    streams, opened = await _opened(backend, model, calls)
    prompt_tokens = _prompt_tokens(opened, generation)
    ticket = counted.ticket
    headers = identity_headers(opened[0].identity) | ticket.headers
    shaped = form(f"{model}@{opened[0].identity.version}")
    ticket.watch.texts = len(streams)
    counted.prompt(prompt_tokens)
    if generation.stream:
        ticket.streams()
        content = ticket.until_its_end(shaped.events(streams, prompt_tokens, counted.answer))
        return EventStream(content, headers=headers | EVENT_STREAM_HEADERS)
    return JSONResponse(await shaped.whole(streams, prompt_tokens, counted.answer), headers=headers)


async def _opened(backend: Generates, model: str, calls: Sequence[GenerateCall]) -> tuple[list[Stream], list[Opened]]:
    """Begin the texts of an answer: the first one where there is room, the others at replicas of the same build."""
    first = cuts.in_words(backend.generate(model, calls[0]))
    opened = await open_all([first])
    build = opened[0].identity.build or None
    others = [cuts.in_words(backend.generate(model, call, build)) for call in calls[1:]]
    try:
        return [first, *others], opened + await open_all(others)
    except BaseException:
        await close_all([first])
        raise


class Counted:
    """Counts an answer that may be given anew: what is done again is not counted again."""

    def __init__(self, ticket: Ticket) -> None:
        self.ticket = ticket
        self._before = 0
        """Generated tokens that were counted for what was lost."""
        self._is_read = False

    def begin_anew(self) -> None:
        """Take note that the answer begins again."""
        self._before = self.ticket.generated

    def prompt(self, tokens: int) -> None:
        """Count the prompt, once."""
        if not self._is_read:
            self._is_read = True
            self.ticket.prompt(tokens)

    def answer(self, generated: int) -> None:
        """Count an answer's tokens, `generated` in all so far. Raises ApiError where the key's budget is spent."""
        self.ticket.answer(max(generated, self._before))


def identity_headers(identity: Identity) -> dict[str, str]:
    """Return the headers that say what made an answer."""
    headers = {"x-tandem-model-version": identity.version}
    return headers | ({"x-tandem-run-id": identity.run_id} if identity.run_id else {})


def _prompt_tokens(opened: Sequence[Opened], generation: Generation) -> int:
    return sum(message.prompt_tokens for message in opened[:: generation.n])
