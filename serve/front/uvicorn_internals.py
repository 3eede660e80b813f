"""What Tandem uses of uvicorn's insides (0.54): its HTTP protocol over httptools, with limits for slow clients."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from cluster.internals import Internal
from serve.front import exchange, refusals
from serve.front.exchange import Cut, Exchange
from serve.front.limits import Limits, Pace, overdue
from serve.front.refusals import Refusal

ENTRIES = (
    Internal(
        "uvicorn.protocols.http.httptools_impl.HttpToolsProtocol",
        "each request's pace is watched between the socket and the routes; uvicorn limits nothing there",
        "clients that send or read slowly hold connections for ever, or no request is answered",
        "uvicorn has time-outs for heads, bodies and readers, and limits for heads",
    ),
    Internal(
        "uvicorn.server.ServerState",
        "the protocol tells it the connections and tasks there are; uvicorn's own Server takes signals and the loop",
        "a gateway does not start",
        "uvicorn serves on a given socket inside a running loop, and stops accepting before it closes",
    ),
)
ASGI: Any = {"version": "3.0", "spec_version": "2.4"}
"""A client that leaves is no matter of the routes: their task is cancelled. So nothing needs to listen for it."""
REFUSED_BEYOND = 256
"""So many connections above the limit are told why they are refused; further ones are cut."""
MOST_UNREAD_BYTES = 64 * 1024
"""What waits of an answer here before its making waits; over TLS both event loops would take 512 KiB."""
OVER_HEAD_S = 2.0
LINGER_S = 1.0
MOST_AHEAD = 8
"""Requests that are read while the first of them is answered."""


class Shared:
    """What the connections of one server share."""

    def __init__(self, app: Any, limits: Limits, log: Callable[[Exchange], None]) -> None:
        self.limits, self.log = limits, log
        self.leaving = False
        self.state = ServerState()
        self.config = Config(
            app,
            http=HttpToolsProtocol,
            ws="none",
            lifespan="off",
            interface="asgi3",
            access_log=False,
            log_config=None,
            log_level="error",
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=limits.idle_s,  # type: ignore[arg-type]  # seconds, for call_later
        )
        self.config.load()

    def protocol(self) -> LimitedProtocol:
        """Return the protocol of a new connection."""
        return LimitedProtocol(self)

    @property
    def connections(self) -> list[LimitedProtocol]:
        """The open connections."""
        return list(self.state.connections)  # type: ignore[arg-type]  # of the one protocol that is used here

    @property
    def open_requests(self) -> int:
        """Requests that are being answered."""
        return len(self.state.tasks)


class HeadJoined:
    """A connection, for one answer: its head leaves with what follows in the same turn of the event loop, in one send.

    uvicorn writes them one by one, and whoever waits for the answer would be woken by the head alone.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._head: bytes | None = None
        self._begun = False

    def write(self, data: bytes) -> None:
        """Hold the first piece, the head, back for a moment; send what follows at once."""
        if self._begun:
            head, self._head = self._head, None
            self._transport.write(data if head is None else head + data)
            return
        self._begun, self._head = True, data
        self._loop.call_soon(self.flush)

    def flush(self) -> None:
        """Send the head, if nothing has followed."""
        head, self._head = self._head, None
        if head is not None:
            self._transport.write(head)

    def close(self) -> None:
        """Close the connection when all is sent."""
        self.flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class LimitedProtocol(HttpToolsProtocol):
    """One connection. What it refuses it answers in OpenAI's shape, and closes."""

    def __init__(self, shared: Shared) -> None:
        super().__init__(shared.config, shared.state, {})
        self.shared, self.limits = shared, shared.limits
        self.pace = Pace()
        self.raw_bytes = self.header_bytes = 0
        self.running: deque[tuple[Exchange, Any]] = deque()
        """What is not answered yet, and uvicorn's part of it, in the order of answers: clients may send ahead."""
        self.refusal: Refusal | None = None

    # -- the connection ----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(MOST_UNREAD_BYTES)
        self.pace.head_since = self.loop.time()
        over = len(self.connections) - self.limits.connections
        if over > REFUSED_BEYOND:
            transport.abort()
        elif over > 0:
            self.app = self._too_many
            self.pace.head_since -= max(0.0, self.limits.head_s - OVER_HEAD_S)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.end("gone")

    def data_received(self, data: bytes) -> None:
        if self.parser is None or self.refusal is not None:
            return  # closed by ourselves: what still comes is not read
        if self.pace.head_since is None and self.pace.body_since is None and not self.is_answering:
            self.pace.head_since = self.loop.time()
        in_head = self.pace.body_since is None
        super().data_received(data)
        if in_head and self.pace.head_since is not None and self.refusal is None:
            self.raw_bytes += len(data)
            if self.raw_bytes > self.limits.head_bytes + self.limits.url_bytes:
                self.refuse(refusals.large_head(self.limits))

    def pause_writing(self) -> None:
        super().pause_writing()
        self.pace.unread_since = self.loop.time()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.pace.unread_since = None

    # -- the parser --------------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["asgi"] = ASGI
        self.header_bytes = 0
        if self.pace.head_since is None:
            self.pace.head_since = self.loop.time()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > self.limits.url_bytes:
            self.refusal = refusals.long_url(self.limits)
            raise ValueError(self.refusal.code)

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self.header_bytes += len(name) + len(value)
        if len(self.headers) > self.limits.headers or self.header_bytes > self.limits.head_bytes:
            self.refusal = refusals.large_head(self.limits)
            raise ValueError(self.refusal.code)

    def on_headers_complete(self) -> None:
        method = self.parser.get_method().decode("ascii")
        begun = exchange.begin(method, self.client[0] if self.client else "", self.headers)
        self.scope[exchange.SCOPE_KEY] = begun  # type: ignore[typeddict-unknown-key]
        super().on_headers_complete()
        self.running.append((begun, self.cycle))
        if 1 < len(self.running) <= MOST_AHEAD:
            self.flow.resume_reading()  # else nobody would see that the client leaves
        self.cycle.transport = HeadJoined(self.transport, self.loop)  # type: ignore[assignment]
        self.cycle.default_headers = [*self.cycle.default_headers, (b"x-request-id", begun.request_id.encode())]
        if self.shared.leaving:
            self.cycle.keep_alive = False
        pace, now = self.pace, self.loop.time()
        pace.head_since, self.raw_bytes = None, 0
        pace.body_since, pace.body_moved, pace.body_bytes = now, now, 0

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        self.pace.body_moved = self.loop.time()
        self.pace.body_bytes += len(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self.pace.body_since = None

    def on_response_complete(self) -> None:
        self.running.popleft()
        super().on_response_complete()
        if self.pace.head_since is not None:
            self.pace.head_since = self.loop.time()

    # -- the server --------------------------------------------------------------------------------------------------

    @property
    def is_answering(self) -> bool:
        """Whether a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def is_quiet(self) -> bool:
        """Whether nothing of a request is there."""
        return not self.is_answering and self.pace.body_since is None and self.raw_bytes == 0

    def watch(self, now: float, passed_s: float) -> None:
        """Look at the client's pace, and cut it where it is too slow."""
        if self.refusal is not None and not self.transport.is_closing():
            return  # it is closed in a moment
        if self.flow.read_paused:
            self.pace.hold(passed_s)
        if self.transport.is_closing() and self.pace.closing_since is None:
            self.pace.closing_since = now
        what = overdue(self.pace, now, self.is_answering, self.limits)
        if what in ("reader", "closing"):
            self.transport.abort()
        elif what is not None:
            self.too_slow(what)

    def too_slow(self, what: Any) -> None:
        """End a request that does not come to its end; a connection that never sent anything is just closed."""
        untouched = what == "head" and not self.raw_bytes
        begun = self.cycle is not None and self.cycle.response_started and what == "body"
        if untouched or begun:
            self.transport.close()
        else:
            self.refuse(refusals.too_slow(what, self.limits))

    def refuse(self, refusal: Refusal) -> None:
        """Answer for the routes, log it, and close."""
        self.refusal = refusal
        if len(self.running) > 1 or (self.running and self.cycle.response_started):  # too late for words
            self.transport.close()
            return
        was = self.running[0][0] if self.running else None
        said = was or exchange.begin("", self.client[0] if self.client else "", ())
        self.transport.write(refusal.raw(said.request_id))
        self._close_when_read()
        said.status, said.refusal = refusal.status, refusal.code
        if was is not None:
            self.end("gone")  # it is logged where it ends
        else:
            self.shared.log(said)

    def _close_when_read(self) -> None:
        """Close when the client has, or in a while: to close before all it sends is read would reset the connection.

        The reset could reach the client before it has read the answer. Over TLS nothing can be half closed.
        """
        if self.transport.can_write_eof():
            self.flow.resume_reading()
            self.transport.write_eof()
            self.loop.call_later(LINGER_S, self.transport.close)
        else:
            self.transport.close()

    def end(self, why: Cut) -> None:
        """End the requests that are not answered yet. With `gone` nobody is there to be told."""
        for begun, cycle in self.running:
            cycle.disconnected = cycle.disconnected or why == "gone"
            begun.end(why)

    def send_400_response(self, msg: str) -> None:
        self.refuse(self.refusal or refusals.NO_HTTP)

    def leave(self, quiet_s: float, now: float) -> None:
        """Answer what runs, and say `connection: close`; close what has been quiet for so long."""
        if self.is_answering:
            self.cycle.keep_alive = False
        elif self.is_quiet and now - self.quiet_since >= quiet_s:
            self.transport.close()

    @property
    def quiet_since(self) -> float:
        """When its last answer ended, or it was accepted."""
        timer = self.timeout_keep_alive_task
        if timer is not None:
            return timer.when() - self.limits.idle_s
        return self.pace.head_since or 0.0

    async def _too_many(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer in place of the routes."""
        said, begun = refusals.TOO_MANY, scope[exchange.SCOPE_KEY]
        begun.status, begun.refusal = said.status, said.code
        self.shared.log(begun)
        await send({"type": "http.response.start", "status": said.status, "headers": said.headers()})
        await send({"type": "http.response.body", "body": said.body()})
