"""HTTP/1.1 for many streams at little cost: a protocol of asyncio over the parser that uvicorn has, httptools.

A client library would cost more CPU for each event than the server that is measured, and both share this machine.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from typing import Any

import httptools

from serve.bench.answers import Answer, StreamedAnswer, WholeAnswer
from serve.bench.settings import Target
from serve.front.client import trust


class Lost(Exception):
    """The connection ended before the answer did. `begun`: whether anything of the answer had come."""

    def __init__(self, reason: str, begun: bool) -> None:
        super().__init__(reason)
        self.begun = begun


class Connection(asyncio.Protocol):
    """One connection that is kept open, for one request at a time."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._over: asyncio.Future[None] | None = None
        self._streams = False
        self._now = 0.0
        self.used = False
        """Whether it has answered a request before."""
        self.open = False
        self._prepare(False)

    def _prepare(self, streams: bool) -> None:
        self._streams = streams
        self.answer: Answer = WholeAnswer()
        self.headers: dict[str, str] = {}
        self.status = 0
        self._parser = httptools.HttpResponseParser(self)

    async def request(self, head: bytes, body: bytes, streams: bool) -> None:
        """Send a request and wait for the whole answer, which is then in `status`, `headers` and `answer`.

        Raises:
            Lost: the connection ended first.
        """
        if not self.open or self._transport is None:
            raise Lost("the connection is closed", begun=False)
        self._prepare(streams)
        self._over = self._loop.create_future()
        self._transport.write(head + body)
        try:
            await self._over
        finally:
            self._over = None
            self.used = True

    def close(self) -> None:
        """Close it at once."""
        self.open = False
        if self._transport is not None:
            self._transport.abort()

    # -- what asyncio calls -------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        self.open = True

    def data_received(self, data: bytes) -> None:
        self._now = time.monotonic()  # uvloop's own time is coarser
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(Lost(f"no HTTP: {error}", begun=True))
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        if self.status and self.answer.whole:  # an answer whose end is the connection's
            self._end()
        else:
            self._end(Lost(str(exc or "the server closed the connection"), begun=self.status != 0))

    # -- what the parser calls ----------------------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        if self._streams and self.status == 200 and "event-stream" in self.headers.get("content-type", ""):
            self.answer = StreamedAnswer()

    def on_body(self, body: bytes) -> None:
        self.answer.feed(body, self._now)

    def on_message_complete(self) -> None:
        if 100 <= self.status < 200:
            return
        self.answer.end()
        keeps = self._parser.should_keep_alive()
        self._end()
        if not keeps:
            self.close()

    def _end(self, error: Lost | None = None) -> None:
        if self._over is None or self._over.done():
            return
        if error is None:
            self._over.set_result(None)
        else:
            self._over.set_exception(error)


def _tls(cacert: str | None, certificate: str | None) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=cacert) if cacert else trust(certificate)


class Client:
    """Connections to one target."""

    def __init__(self, target: Target, cacert: str | None = None, certificate: str | None = None) -> None:
        """`cacert` and `certificate`: as in Settings. Raises OSError or UserError for files that are none."""
        self._target = target
        self._tls = _tls(cacert, certificate) if target.tls else None
        self._idle: list[Connection] = []

    def head(self, method: str, path: str, length: int, key: str | None, session: str | None = None) -> bytes:
        """Return a request's line and headers."""
        target = self._target
        host = f"[{target.host}]" if ":" in target.host else target.host
        lines = [f"{method} {target.prefix}{path} HTTP/1.1", f"host: {host}:{target.port}", f"content-length: {length}"]
        lines += ["content-type: application/json"] if length else []
        lines += [f"authorization: Bearer {key}"] if key else []
        lines += [f"x-session-id: {session}"] if session else []
        return "\r\n".join([*lines, "accept: */*", "user-agent: tandem-bench", "", ""]).encode("latin-1")

    async def take(self) -> Connection:
        """Return an idle connection, or a new one. Raises OSError."""
        while self._idle:
            connection = self._idle.pop()
            if connection.open:
                return connection
        return await self.connect()

    async def connect(self) -> Connection:
        """Return a new connection. Raises OSError."""
        loop = asyncio.get_running_loop()
        _, made = await loop.create_connection(
            lambda: Connection(loop), self._target.host, self._target.port, ssl=self._tls
        )
        return made

    def give(self, connection: Connection) -> None:
        """Keep a connection for the next request."""
        if connection.open:
            self._idle.append(connection)

    async def get(self, path: str, key: str | None) -> tuple[int, dict[str, str], Any]:
        """Return (status, headers, JSON) of a GET. Raises OSError or Lost."""
        return await self._whole("GET", path, b"", key)

    async def post(self, path: str, body: bytes, key: str | None) -> tuple[int, dict[str, str], Any]:
        """Return (status, headers, JSON) of a POST. Raises OSError or Lost."""
        return await self._whole("POST", path, body, key)

    async def _whole(self, method: str, path: str, body: bytes, key: str | None) -> tuple[int, dict[str, str], Any]:
        connection = await self.take()
        await connection.request(self.head(method, path, len(body), key), body, streams=False)
        self.give(connection)
        answer = connection.answer
        assert isinstance(answer, WholeAnswer)
        return connection.status, connection.headers, answer.value if answer.value is not None else answer.error

    def close(self) -> None:
        """Close the idle connections."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()
