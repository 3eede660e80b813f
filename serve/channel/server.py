"""The replica's end: gateways connect, and their calls become tasks; each gateway has one connection for all of them.

    server = Server(replica_id, slots, secret, answer)
    address = await server.start(host)
    …
    await server.leave(drain_s)       # refuse what comes, let what runs end, give the rest back, close

A task that nobody waits for any more is cancelled, which frees its slot in the engine. A gateway that does not read is
not written to: its tasks wait, and after `SLOW_S` its connection is cut.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, cast

from serve import quotes
from serve.channel import handshake
from serve.channel.frames import MOST_BYTES, MOST_BYTES_UNKNOWN, Frame, FrameError, Kind, Splitter, decode, encode
from serve.channel.handshake import Denied
from serve.channel.outbox import Outbox
from serve.wire import EmbedCall, GenerateCall, InferCall

logger = logging.getLogger(__name__)
Call = GenerateCall | InferCall | EmbedCall
Answer = Callable[[Any], AsyncGenerator[Any, None]]
"""What a call is answered with, message by message; closing it ends the work."""

HANDSHAKE_S = 5.0
MOST_UNKNOWN = 256
"""Connections at a time that have not shown that they know the secret."""
SLOW_S = 15.0
"""A gateway that reads nothing for so long is cut; its clients' requests go on elsewhere."""
GONE_S = 20.0
"""A gateway that has not even sent a ping for so long is gone with its machine: its requests are ended."""
BUFFER_BYTES = 1 << 20
"""What may wait for a gateway to read it, beside one message of each stream."""
TELL_LOAD_S = 0.25
LEAST_MOST, MOST_PER_SLOT = 8, 2.5


class Server:
    """Takes the calls of all gateways. Its methods are called on one event loop."""

    def __init__(self, replica_id: str, slots: int, secret: bytes, answer: Answer) -> None:
        self.replica_id, self.slots, self.secret, self.answer = replica_id, slots, secret, answer
        self.address = ""
        """Where it listens, `host:port`."""
        self.leaving = False
        self.most = max(LEAST_MOST, math.ceil(MOST_PER_SLOT * slots))
        """Calls that it takes at a time. Gateways keep to fewer; what is above is sent back."""
        self.peers: set[Peer] = set()
        self._server: asyncio.AbstractServer | None = None
        self._working: set[asyncio.Task[None]] = set()
        self._idle = asyncio.Event()
        self._telling: asyncio.TimerHandle | None = None

    @property
    def running(self) -> int:
        """Calls that it works on, of all gateways."""
        return sum(len(peer.tasks) for peer in self.peers)

    async def start(self, host: str) -> str:
        """Listen on a free port of `host`; return the address."""
        self._server = await asyncio.get_running_loop().create_server(lambda: Peer(self), host, 0)
        host, port = self._server.sockets[0].getsockname()[:2]
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        return self.address

    def refuse_more(self) -> None:
        """Begin to leave: tell every gateway, and give back what is called from now on."""
        self.leaving = True
        for peer in self.peers:
            peer.tell(Kind.LEAVING)

    async def leave(self, bound_s: float) -> None:
        """Leave: let what runs end, for `bound_s` at most, give the rest back to its gateways, and close."""
        self.refuse_more()
        try:
            await asyncio.wait_for(self._until_idle(), bound_s)
        except asyncio.TimeoutError:
            logger.info("leaving: %d requests go on at other replicas after %g s", self.running, bound_s)
        for peer in list(self.peers):
            peer.give_back()
        await self.close()

    async def close(self) -> None:
        """Stop listening and end every connection, with what runs."""
        if self._server is not None:
            self._server.close()
        for peer in list(self.peers):
            peer.end()
        for task in self._working:
            task.cancel()
        await asyncio.gather(*self._working, return_exceptions=True)

    def work(self, answering: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Begin to answer a call; `close` waits for its end."""
        task = asyncio.create_task(answering)
        self._working.add(task)
        task.add_done_callback(self._working.discard)
        return task

    def changed(self) -> None:
        """Take note that a call began or ended; gateways are told of the load a moment later."""
        if self.running == 0:
            self._idle.set()
        if self._telling is None:
            self._telling = asyncio.get_running_loop().call_later(TELL_LOAD_S, self._tell_load)

    def _tell_load(self) -> None:
        self._telling = None
        for peer in self.peers:
            peer.tell_load()

    async def _until_idle(self) -> None:
        while self.running:
            self._idle.clear()
            await self._idle.wait()


class Peer(asyncio.Protocol):
    """One gateway's connection."""

    def __init__(self, server: Server) -> None:
        self.tasks: dict[int, asyncio.Task[None]] = {}
        """The calls being answered, by their stream."""
        self._server = server
        self._splitter = Splitter(MOST_BYTES_UNKNOWN)
        self._nonce = handshake.nonce()
        self._known, self._told = False, 0
        self._may_write = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._watching: asyncio.TimerHandle | None = None
        self._heard = False

    # -- the connection ----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one by its methods only
        self._out = Outbox(self._transport)
        if sum(not peer._known for peer in self._server.peers) >= MOST_UNKNOWN:
            self._transport.abort()
            return
        self._server.peers.add(self)
        self._transport.set_write_buffer_limits(BUFFER_BYTES)
        self._may_write.set()
        self._out.send(encode(Kind.HELLO, 0, [handshake.VERSION, self._nonce]))
        self._cut_after(HANDSHAKE_S, "it has not shown that it knows the secret")

    def connection_lost(self, error: Exception | None) -> None:
        self._stop_timer()
        if self._watching is not None:
            self._watching.cancel()
        self._may_write.set()
        for task in self.tasks.values():
            task.cancel()
        self.tasks.clear()
        self._server.peers.discard(self)
        self._server.changed()

    def data_received(self, data: bytes) -> None:
        self._heard = True
        try:
            for body in self._splitter.feed(data):
                self._take(decode(body, self._known))
        except (FrameError, Denied) as error:
            self._cut(str(error))

    def pause_writing(self) -> None:
        self._may_write.clear()
        self._cut_after(SLOW_S, f"it reads nothing, for {SLOW_S:g} s")

    def resume_writing(self) -> None:
        self._may_write.set()
        self._stop_timer()
        if self._server.leaving:
            self.tell(Kind.LEAVING)
        self.tell_load()  # what was not told while nothing could be: perhaps nothing changes any more

    # -- frames ------------------------------------------------------------------------------------------------------

    def tell(self, kind: Kind, content: Any = None) -> None:
        """Send a frame about the whole connection, to a gateway that is known and reads."""
        if self._known and self._may_write.is_set():
            self._out.send(encode(kind, 0, content))

    def tell_load(self) -> None:
        """Tell what the replica does for others, where that has changed."""
        others = self._server.running - len(self.tasks)
        if others != self._told and self._known and self._may_write.is_set():
            self._told = others
            self.tell(Kind.LOAD, others)

    def give_back(self) -> None:
        """End every call: another replica is to go on with it."""
        tasks, self.tasks = self.tasks, {}
        for stream, task in tasks.items():
            self._out.send(encode(Kind.MOVED, stream))
            task.cancel()

    def end(self) -> None:
        """Send what waits, and close; a gateway that does not read is not waited for."""
        self._out.flush()
        if self._may_write.is_set():
            self._transport.close()
        else:
            self._transport.abort()

    def _take(self, frame: Frame) -> None:
        if not self._known:
            self._welcome(frame)
        elif frame.kind == Kind.CALL:
            self._begin(frame.stream, frame.content)
        elif frame.kind == Kind.CANCEL:
            if task := self.tasks.pop(frame.stream, None):
                task.cancel()
                self._server.changed()
        elif frame.kind == Kind.PING:
            self.tell(Kind.PONG)
        else:
            raise FrameError(f"a frame of kind {frame.kind} from a gateway")

    def _welcome(self, frame: Frame) -> None:
        server = self._server
        own = handshake.check_proof(frame, server.secret, server.replica_id, self._nonce)
        self._known = True
        self._stop_timer()
        self._splitter.most_bytes = MOST_BYTES
        self._watch()
        self._out.send(encode(Kind.WELCOME, 0, [own, server.slots, server.leaving]))
        self.tell_load()

    def _begin(self, stream: int, call: Any) -> None:
        if not isinstance(call, Call) or stream in self.tasks:
            raise FrameError("a call that is none, or whose stream is open already")
        if self._server.leaving:
            self._out.send(encode(Kind.MOVED, stream))
        elif self._server.running >= self._server.most:
            self._out.send(encode(Kind.BUSY, stream))
        else:
            self.tasks[stream] = self._server.work(self._answer(stream, call))
            self._server.changed()

    async def _answer(self, stream: int, call: Call) -> None:
        try:
            async with aclosing(self._server.answer(call)) as messages:
                async for message in messages:
                    if not self._may_write.is_set():
                        await self._may_write.wait()
                    self._out.send(encode(Kind.MESSAGE, stream, message))
            self._end(stream, Kind.END)
        except Exception as error:  # of the engine's code, which may be the user's own, or what cannot be sent
            logger.error("request %s failed\n%s", call.request_id, quotes.failure(error, call))
            self._end(stream, Kind.FAILED)

    def _end(self, stream: int, how: Kind) -> None:
        if self.tasks.pop(stream, None) is not None:
            self._out.send(encode(how, stream))
            self._server.changed()

    # -- cutting -----------------------------------------------------------------------------------------------------

    def _cut_after(self, seconds: float, why: str) -> None:
        self._stop_timer()
        self._timer = asyncio.get_running_loop().call_later(seconds, self._cut, why)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _watch(self) -> None:
        if not self._heard:
            self._cut(f"it has said nothing for {GONE_S:g} s")
            return
        self._heard = False
        self._watching = asyncio.get_running_loop().call_later(GONE_S, self._watch)

    def _cut(self, why: str) -> None:
        peer = self._transport.get_extra_info("peername")
        logger.warning("the connection from %s is cut: %s", peer, why)
        self._transport.abort()
