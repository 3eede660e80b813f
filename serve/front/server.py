"""An HTTP server inside a running loop, on a socket that other gateways of the node share."""

from __future__ import annotations

import asyncio
import os
import resource
import ssl
import time
from collections.abc import Callable
from email.utils import formatdate
from typing import Any

from serve.front import claim, listening
from serve.front.exchange import Exchange
from serve.front.limits import Limits
from serve.front.uvicorn_internals import Shared

LOOK_S = 0.5
QUIET_S = 16.0
"""A leaving gateway closes a connection that has been quiet for so long: clients' pools close theirs after 5 to 15 s,
so that hardly any sends a request just then."""
ALONE_QUIET_S = 1.0
"""The same where nobody else listens there: whoever asks on and on is told `connection: close` first."""
CUT_S = 0.5
"""What is cut ends within this: nothing but its clean-up is left."""
FILES_BESIDE = 512


class Server:
    """Serves an ASGI app from `start` to `leave`."""

    def __init__(
        self,
        app: Any,
        host: str,
        port: int,
        limits: Limits,
        tls: ssl.SSLContext | None = None,
        log: Callable[[Exchange], None] = lambda _: None,
        owner: str | None = None,
    ) -> None:
        """Serve `app` at an address, which processes of the same `owner` may share; None: nobody else does."""
        self._owner = owner
        self._claim: int | None = None
        self._shared = Shared(app, limits, log)
        self._host, self._port, self._limits, self._tls = host, port, limits, tls
        self._socket: Any = None
        self._server: asyncio.AbstractServer | None = None
        self._watch: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._port

    @property
    def open_requests(self) -> int:
        """Requests that are being answered."""
        return self._shared.open_requests

    @property
    def connections(self) -> int:
        """Open connections."""
        return len(self._shared.connections)

    @property
    def is_listening(self) -> bool:
        """Whether it takes connections."""
        return self._server is not None and self._server.is_serving()

    async def start(self) -> None:
        """Listen. Raises OSError where nothing can."""
        _allow_files(self._limits.connections + FILES_BESIDE)
        if self._owner is not None and self._port:  # one that the system picks is nobody else's
            self._claim = claim.take(self._host, self._port, self._owner)
        try:
            self._socket = listening.listen(self._host, self._port)
        except OSError:
            self._give_back()
            raise
        self._port = int(self._socket.getsockname()[1])
        patience_s = self._limits.head_s if self._tls else None
        loop = asyncio.get_running_loop()
        self._date()
        self._server = await loop.create_server(
            self._shared.protocol,
            sock=self._socket,
            backlog=listening.BACKLOG,
            ssl=self._tls,
            ssl_handshake_timeout=patience_s,
        )
        self._watch = loop.create_task(self._watched())

    async def leave(self, limit_s: float) -> None:
        """Take no more connections, end what runs within `limit_s`, and close."""
        if self._server is None or self._watch is None:
            return
        server, self._server = self._server, None
        await listening.until_empty(self._socket)
        server.close()
        self._socket.close()
        self._give_back()
        self._shared.leaving = True
        quiet_s = QUIET_S if await listening.answers(self._host, self._port) else ALONE_QUIET_S
        await self._drained(quiet_s, limit_s)
        await self._cut()
        self._watch.cancel()

    def _give_back(self) -> None:
        if self._claim is not None:
            os.close(self._claim)
            self._claim = None

    async def _drained(self, quiet_s: float, limit_s: float) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + limit_s
        while (connections := self._shared.connections) and (now := loop.time()) < end:
            for connection in connections:
                connection.leave(quiet_s, now)
            await asyncio.sleep(0.1)

    async def _cut(self) -> None:
        """Tell those whose answers are not complete, and close every connection."""
        for connection in self._shared.connections:
            connection.end("leaving")
        end = asyncio.get_running_loop().time() + CUT_S
        while self.open_requests and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.01)
        for connection in self._shared.connections:
            connection.transport.abort()

    async def _watched(self) -> None:
        loop = asyncio.get_running_loop()
        last = loop.time()
        while True:
            await asyncio.sleep(LOOK_S)
            now = loop.time()
            for connection in self._shared.connections:
                connection.watch(now, now - last)
            last = now
            self._date()

    def _date(self) -> None:
        self._shared.state.default_headers = [(b"date", formatdate(time.time(), usegmt=True).encode())]


def _allow_files(wanted: int) -> None:
    """Raise the limit of open files as far as this user may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
