"""One request as it is seen from outside: its route, model, status, first and last token.

The request that is being handled is found by `current()`, a context variable, as tracing libraries do it: who counts a
token or shapes an error is far from who saw the request arrive.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.front import cuts, exchange
from serve.front.exchange import Exchange
from serve.metrics.record import ModelRecord, Record

CLIENT_LEFT = 499
"""The status of a request whose client left before the answer began, as nginx logs it."""
NO_ROUTE = "other"
_now = time.perf_counter


class Watch:
    """What is measured of one request."""

    __slots__ = ("_first", "_first_tokens", "_last", "_numbers", "_record", "_started", "_tokens", "model", "texts")

    def __init__(self, record: Record) -> None:
        self._record = record
        self._started = _now()
        self._numbers: ModelRecord | None = None
        """Of a request that was admitted to its model."""
        self._first = self._last = 0.0
        self._tokens = self._first_tokens = 0
        self.model = ""
        """The served model that was called."""
        self.texts = 1
        """Texts that the answer has, side by side."""

    def admitted(self, waited_s: float) -> None:
        """Take note that the request got its turn at the model."""
        self._numbers = self._record.model(self.model)
        self._numbers.queue.observe(waited_s)
        exchange.current().waited_s = waited_s

    def tokens(self, key: str, prompt: int, generated: int) -> None:
        """Count tokens; the first generated ones are the first token's time."""
        numbers = self._numbers
        if numbers is None:
            return
        if generated:
            numbers.generated += generated
            self._tokens += generated
            self._last = _now()
            if not self._first:
                self._first, self._first_tokens = self._last, generated
                numbers.to_first_token.observe(self._last - self._started)
            if key:
                self._record.keys.add(key, self.model, "generated", generated)
        if prompt:
            numbers.prompt += prompt
            if key:
                self._record.keys.add(key, self.model, "prompt", prompt)

    def error(self, kind: str | None) -> None:
        """Count an error that the client is told."""
        self._record.error(self.model, kind or "unknown")

    def end(self, route: str, status: int) -> None:
        """Count the request."""
        self._record.request(self.model, route, status)
        if self._numbers is None:
            return
        self._numbers.request.observe(_now() - self._started)
        later = self._tokens - self._first_tokens
        if later > 0:
            self._numbers.to_next_token.observe((self._last - self._first) * self.texts / later)


_current: ContextVar[Watch | None] = ContextVar("tandem_watch", default=None)
_UNREAD = Record("")


def current() -> Watch:
    """Return the watch of the request that is being handled; outside of one, a watch that nobody reads."""
    return _current.get() or Watch(_UNREAD)


class Watched:
    """Measure every request, in front of whatever may answer it. One inside of another one leaves it to that."""

    def __init__(self, app: ASGIApp, record: Callable[[], Record], routes: Sequence[Any]) -> None:
        """`routes` are the app's: a path that none of them has makes no series of its own."""
        self._app, self._record, self._routes = app, record, RouteNames(routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _current.get() is not None:
            await self._app(scope, receive, send)
            return
        watch, status = Watch(self._record()), CLIENT_LEFT
        token = _current.set(watch)

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception:
            watch.error("internal_error")  # in the middle of an answer
            raise
        finally:
            _current.reset(token)
            ended = exchange.current()
            if status == CLIENT_LEFT and ended.refusal and ended.status:
                status = ended.status
                watch.error(ended.refusal)
            elif status == CLIENT_LEFT and (said := cuts.told(ended.cut)):
                status = said.status
                watch.error(said.code)
            named = ended.template.replace(":path", "") if ended.template else self._routes.name(scope["path"])
            watch.end(named, status)
            ended.is_counted = True


def count_refused(record: Record, ended: Exchange) -> None:
    """Count a request that the server answered in place of the routes: what they answered is counted already."""
    if not ended.is_counted:
        record.request("", NO_ROUTE, ended.status or CLIENT_LEFT)
        if ended.refusal:
            record.error("", ended.refusal)


class RouteNames:
    """Finds the route of a path, as the app has it written."""

    def __init__(self, routes: Sequence[Any]) -> None:
        found = [(route.path.replace(":path", ""), route) for route in routes if hasattr(route, "path_regex")]
        self._plain = {path for path, _ in found if "{" not in path}
        self._patterns = [(path, route.path_regex) for path, route in found if path not in self._plain]

    def name(self, path: str) -> str:
        """Return the route's path with its parameters' names, or `other`."""
        path = path.rstrip("/") or "/"
        if path in self._plain:
            return path
        return next((route for route, pattern in self._patterns if pattern.match(path)), NO_ROUTE)
