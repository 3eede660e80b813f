"""The outermost ASGI application: it runs the routes as the exchange of a request, to its end or its deadline."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api.body import ApiError, shaped
from serve.api.middleware import CrossOrigin
from serve.front import cuts, exchange
from serve.front.exchange import Exchange
from serve.front.spans import of

if TYPE_CHECKING:
    from serve.tracing.spans import Spans

_NO_SPAN = nullcontext()
TIMEOUT_HEADER = b"x-tandem-timeout-s"


class Front:
    """Runs each request of `app`, and logs it when it has ended."""

    def __init__(
        self,
        app: ASGIApp,
        log: Callable[[Exchange], None],
        most_s: float | None = None,
        origins: Callable[[], Sequence[str]] = tuple,
        spans: Spans | None = None,
    ) -> None:
        """Make the front of `app`.

        Args:
            log: takes each request when it has ended.
            most_s: how long a request may take in all; clients may ask for less.
            origins: whose pages may read what is answered here in place of the routes.
            spans: make a span of each request; None: nobody wants any.
        """
        self._app, self._log, self._most_s, self._origins, self._spans = app, log, most_s, origins, spans

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        run = _Run(scope, receive, send, self._origins)
        exchange.enter(run.exchange)
        timer = None
        try:
            limit_s = wanted_s(scope["headers"], self._most_s)
            run.exchange.task = asyncio.current_task()
            if limit_s is not None:
                run.exchange.expires = run.exchange.began + limit_s
                left = max(0.0, run.exchange.expires - time.monotonic())
                timer = asyncio.get_running_loop().call_later(left, run.exchange.end, "expired")
            with _NO_SPAN if self._spans is None else of(self._spans, run.exchange):
                await self._app(scope, receive, run.send)
        except ApiError as error:
            run.exchange.refusal = error.code
            await run.say(error)
        except asyncio.CancelledError:
            if run.exchange.cut is None:
                raise
            if said := cuts.told(run.exchange.cut):
                await run.say(said)
        finally:
            run.exchange.task = None
            if timer is not None:
                timer.cancel()
            self._log(run.exchange)


class _Run:
    """One request's answer on its way."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, origins: Callable[[], Sequence[str]]) -> None:
        self.exchange: Exchange = scope[exchange.SCOPE_KEY]
        self._scope, self._receive, self._send, self._origins = scope, receive, send, origins
        self._is_events = self._ended = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.exchange.status = message["status"]
            self._is_events = any(
                name == b"content-type" and value.startswith(b"text/event-stream")
                for name, value in message.get("headers", ())
            )
        else:
            self._ended = not message.get("more_body", False)
        await self._send(message)

    async def say(self, error: ApiError) -> None:
        """End the answer with an error, wherever it is."""
        if self._ended:
            return
        content = shaped(self._scope["path"], error)
        if self.exchange.status is None:
            answer = JSONResponse(content, error.status, headers=error.headers)
            await CrossOrigin(answer, self._origins)(self._scope, self._receive, self.send)
        elif self._is_events:
            event = f"data: {json.dumps(content)}\n\n".encode()
            await self.send({"type": "http.response.body", "body": event})
        else:
            raise error  # in the middle of a whole answer: the connection is closed


def wanted_s(headers: Any, most_s: float | None) -> float | None:
    """Return how long a request may take: the least of ours and the client's. Raises ApiError (400)."""
    for name, value in headers:
        if name == TIMEOUT_HEADER:
            return min(_seconds(value), most_s or math.inf)
    return most_s


def _seconds(value: bytes) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        said = value[:40].decode("latin-1")
        message = f"{TIMEOUT_HEADER.decode()} must be a number of seconds above 0 (given: {said!r})"
        raise ApiError(400, message, code="invalid_value", param=TIMEOUT_HEADER.decode())
    return seconds
