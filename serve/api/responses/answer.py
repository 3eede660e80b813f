"""Answers of the Responses API: the whole object, or typed events as its clients read them."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from itertools import count as counting
from typing import Any

from serve.api.body import ApiError
from serve.api.responses.output import Event, Output
from serve.api.responses.parse import Wanted
from serve.api.streaming import Count, Stream, chunks, close_all
from serve.metrics import watch


class ResponseForm:
    """One answer, in the form of a response."""

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self._created = int(time.time())
        self._output = Output(wanted.generation.logprobs)
        self._numbers = counting()

    async def whole(self, streams: Sequence[Stream], prompt_tokens: int, count: Count) -> dict[str, Any]:
        """Return the response; `count` is told of all generated tokens so far, and may raise ApiError."""
        (stream,) = streams
        reason, tokens = None, 0
        try:
            async for chunk in chunks(stream, count):
                self._output.add(chunk)
                reason, tokens = chunk.finish_reason, chunk.completion_tokens
        finally:
            await close_all(streams)
        status = _status(reason)
        self._output.end(status)
        return self._response(status, usage(prompt_tokens, tokens))

    async def events(self, streams: Sequence[Stream], prompt_tokens: int, count: Count) -> AsyncIterator[bytes]:
        """Send the events. An error in the middle is `response.failed`, and `error` after it, which clients raise.

        `count` is told of all generated tokens so far before they are sent, and may raise ApiError.
        """
        (stream,) = streams
        reason, tokens = None, 0
        try:
            begun = self._response("in_progress", None)
            yield self._sent({"type": f"response.{name}", "response": begun} for name in ("created", "in_progress"))
            async for chunk in chunks(stream, count):
                reason, tokens = chunk.finish_reason, chunk.completion_tokens
                if events := self._output.add(chunk):
                    yield self._sent(events)
            status = _status(reason)
            ended = self._output.end(status)
            response = self._response(status, usage(prompt_tokens, tokens))
            yield self._sent([*ended, {"type": f"response.{status}", "response": response}])
        except ApiError as error:
            watch.current().error(error.code)
            failed = self._response("failed", usage(prompt_tokens, tokens), error)
            yield self._sent([{"type": "response.failed", "response": failed}, _error(error)])
        finally:
            await close_all(streams)

    def _sent(self, events: Iterable[Event]) -> bytes:
        """Return events as they are sent: named, and numbered."""
        return b"".join(_event({**event, "sequence_number": next(self._numbers)}) for event in events)

    def _response(self, status: str, used: dict[str, Any] | None, error: ApiError | None = None) -> dict[str, Any]:
        return {
            "id": self._wanted.generation.request_id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": _failure(error) if error else None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": self._output.items(),
            "usage": used,
            **self._wanted.echoed,
        }


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """Return how many tokens were read and generated. What was cached, or thought, is not told apart: 0."""
    return {
        "input_tokens": prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt_tokens + completion_tokens,
    }


def _status(reason: str | None) -> str:
    return "incomplete" if reason == "length" else "completed"


def _failure(error: ApiError) -> dict[str, Any]:
    """Return an error as a response has it, whose type knows few codes."""
    code = {429: "rate_limit_exceeded"}.get(error.status, "server_error" if error.status >= 500 else "invalid_prompt")
    return {"code": code, "message": error.message}


def _error(error: ApiError) -> Event:
    """Return the event of an error, with its fields as documented, and inside `error`, where OpenAI's client looks."""
    body = error.body()["error"]
    return {"type": "error", **{name: body[name] for name in ("code", "message", "param")}, "error": body}


def _event(event: Mapping[str, Any]) -> bytes:
    data = json.dumps(event, ensure_ascii=False, separators=(",", ":"))
    return f"event: {event['type']}\ndata: {data}\n\n".encode()
