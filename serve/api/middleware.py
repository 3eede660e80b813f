"""What surrounds every route: cross-origin requests, HTTP/1.0 clients, failures, and paths that end in a slash."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve import quotes
from serve.front import exchange

logger = logging.getLogger(__name__)

EXPOSED = (
    "x-tandem-model-version",
    "x-tandem-run-id",
    "x-request-id",
    "retry-after",
    "x-should-retry",
    *(f"x-ratelimit-{what}-{kind}" for kind in ("requests", "tokens") for what in ("limit", "remaining", "reset")),
    "inference-header-content-length",
)
"""Headers of an answer that scripts of another origin may read."""


class CrossOrigin:
    """Let scripts of the origins that the serve spec names read the answers; of none where it names none."""

    def __init__(self, app: ASGIApp, origins: Callable[[], Sequence[str]]) -> None:
        self._app = app
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        origins = self._origins() if scope["type"] == "http" else ()
        await (_allowing(self._app, origins) if origins else self._app)(scope, receive, send)


class WholeForOldClients:
    """Send HTTP/1.0 clients an answer in one piece, with its length: they know no chunked coding.

    Servers differ here (uvicorn's httptools protocol codes the answer in chunks for any version), so that a stream is
    held back until it ends.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        old = scope["type"] == "http" and scope.get("http_version") == "1.0"
        await self._app(scope, receive, _Whole(send) if old else send)


class _Whole:
    """A `send` that passes a response on when it has ended."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message = {}
        self._body = bytearray()

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
        elif message["type"] == "http.response.body":
            self._body += message.get("body", b"")
            if not message.get("more_body", False):
                await self._finish()
        else:
            await self._send(message)

    async def _finish(self) -> None:
        unset = {b"content-length", b"transfer-encoding"}
        headers = [(name, value) for name, value in self._start.get("headers", ()) if name.lower() not in unset]
        length = (b"content-length", str(len(self._body)).encode())
        await self._send({**self._start, "headers": [*headers, length]})
        await self._send({"type": "http.response.body", "body": bytes(self._body), "more_body": False})


class Failures:
    """Answer what failed unexpectedly, and log it.

    Starlette would do so outside of all of these, so that a page of another origin could not read that it failed.
    """

    def __init__(self, app: ASGIApp, answer: Callable[[str, str], ASGIApp]) -> None:
        """`answer` returns the response to a path's request; the log has the failure under the request's id."""
        self._app = app
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except ClientDisconnect:
            return  # in the middle of its own request: nobody is there to be answered
        except Exception as error:
            if scope["type"] != "http":
                raise
            failure = exchange.current().request_id
            _log(failure, scope, error)
            if begun:  # too late for an answer: the connection is closed, so that nobody takes the part for the whole
                raise AnswerCut(failure) from None
            await self._answer(scope["path"], failure)(scope, receive, send)


class AnswerCut(Exception):
    """The answer with this id ends in its middle; the log has the reason already."""


def _log(failure: str, scope: Scope, error: Exception) -> None:
    place = f"{failure}: {scope['method']} {scope['path']:.200} failed"
    if quotes.may_quote(error):
        logger.error("%s\n%s", place, quotes.failure(error, None))
    else:
        logger.error("%s", place, exc_info=error)


class SlashAtTheEnd:
    """Answer a path that ends in a slash like the one without: a redirect would lose its scheme behind a proxy."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if scope["type"] == "http" and len(path) > 1 and path.endswith("/"):
            scope = {**scope, "path": path.rstrip("/") or "/"}
        await self._app(scope, receive, send)


def _allowing(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    return CORSMiddleware(
        app,
        allow_origins=list(origins),
        allow_methods=["GET", "HEAD", "POST"],
        allow_headers=["*"],
        expose_headers=list(EXPOSED),
    )
