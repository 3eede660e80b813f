"""The gateway's end: one connection to each replica, for all calls.

    connection = await connect(address, secret, replica_id, on_change)
    async for message in connection.stream(call): …

Closing a stream cancels its call. A connection that ends, however, raises ReplicaLost in every stream that it had.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any, cast

from serve.channel import handshake
from serve.channel.frames import MOST_BYTES, MOST_BYTES_UNKNOWN, Frame, FrameError, Kind, Splitter, decode, encode
from serve.channel.handshake import Denied
from serve.channel.mailbox import Ended, Mailbox
from serve.channel.outbox import Outbox
from serve.routing.lost import ReplicaLost

logger = logging.getLogger(__name__)
CONNECT_S = 5.0
PING_S = 1.0
SILENT_S = 3.5
"""A replica that has said nothing for so long gets no new calls until it speaks again."""
GONE_S = 12.0
"""One that is silent for so long is taken for lost: Ray would have noticed a dead node (cluster/ray_process_internals)
and Ray Serve a dead process by then, so the way to it is broken; its calls go on elsewhere."""


class Busy(Exception):
    """The replica has too much to take the call."""


class CallFailed(Exception):
    """The replica's code failed on the call; its log has the reason."""


async def connect(
    address: str, secret: bytes, replica_id: str, on_change: Callable[[], None], timeout_s: float = CONNECT_S
) -> Link:
    """Connect to the replica at `address`, `host:port`.

    Args:
        replica_id: the replica that is meant: no other one at that address, or behind it, is connected to.
        on_change: called whenever it may take more calls than before, or no more.

    Raises:
        OSError: it cannot be reached, in time, or closed the connection: it is another replica.
        Denied: it does not know the secret, or speaks another version.
    """
    host, _, port = address.rpartition(":")
    loop = asyncio.get_running_loop()
    link = Link(secret, replica_id, on_change)
    try:
        await asyncio.wait_for(loop.create_connection(lambda: link, host.strip("[]"), int(port)), timeout_s)
        await asyncio.wait_for(asyncio.shield(link.ready), timeout_s)
    except asyncio.TimeoutError:
        link.close()
        raise TimeoutError(f"{address} does not answer") from None
    except BaseException:
        link.close()
        raise
    return link


class Link(asyncio.Protocol):
    """A connection to one replica. Its methods are called on one event loop."""

    def __init__(self, secret: bytes, replica_id: str, on_change: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[None] = loop.create_future()
        """Done when both ends know each other."""
        self.replica_id, self.slots, self.leaving = replica_id, 1, False
        self.others = 0
        """Calls that the replica has of other gateways, as it told last."""
        self.lost = False
        self._secret, self._on_change, self._loop = secret, on_change, loop
        self._nonce, self._expected = handshake.nonce(), b""
        self._splitter = Splitter(MOST_BYTES_UNKNOWN)
        self._streams: dict[int, Mailbox] = {}
        self._last_stream = 0
        self._heard, self._unheard = time.monotonic(), 0
        self._pinging: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport | None = None

    @property
    def responsive(self) -> bool:
        """Whether the replica answers."""
        return time.monotonic() - self._heard < SILENT_S

    async def stream(self, call: Any, on_end: Callable[[], None] = lambda: None) -> AsyncGenerator[Any, None]:
        """Send a call and yield what it is answered with. Closing it cancels the call.

        Args:
            on_end: called when the replica is done with the call, though what it said may not have been read yet.

        Raises:
            ReplicaLost: the replica, or the way to it, is no more; or it leaves and gave the call back.
            Busy: it takes no more calls.
            CallFailed: its code failed on this one.
            TypeError, ValueError: the call cannot be sent.
        """
        if self.lost:
            raise ReplicaLost(self.replica_id)
        self._last_stream += 1
        number, mailbox = self._last_stream, Mailbox(on_end)
        frame = encode(Kind.CALL, number, call)
        self._streams[number] = mailbox
        try:
            self._out.send(frame)
            while True:
                yield await mailbox.take()
        except Ended:
            return
        finally:
            del self._streams[number]
            if not mailbox.ended:
                self._out.send(encode(Kind.CANCEL, number))

    def close(self) -> None:
        """End the connection."""
        if self._transport is not None:
            self._transport.abort()
        if not self.ready.done():
            self.ready.cancel()

    # -- the connection ----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one by its methods only
        self._out = Outbox(self._transport)
        self._ping()

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = True
        if self._pinging is not None:
            self._pinging.cancel()
        if not self.ready.done():
            self.ready.set_exception(error or ConnectionResetError("the replica closed the connection"))
            self.ready.exception()  # whoever waits for it is told; perhaps nobody does
        for mailbox in self._streams.values():
            mailbox.end(ReplicaLost(self.replica_id))
        self._on_change()

    def data_received(self, data: bytes) -> None:
        was_silent = not self.responsive
        self._heard, self._unheard = time.monotonic(), 0
        if was_silent:
            self._on_change()
        try:
            for body in self._splitter.feed(data):
                self._take(decode(body, self.ready.done()))
        except (FrameError, Denied) as error:
            logger.warning("the connection to replica %s ends: %s", self.replica_id, error)
            if not self.ready.done():
                self.ready.set_exception(error)
                self.ready.exception()
            assert self._transport is not None
            self._transport.abort()

    def _take(self, frame: Frame) -> None:
        if not self.ready.done():
            self._greet(frame)
        elif frame.stream:
            self.leaving = self.leaving or frame.kind == Kind.MOVED
            if mailbox := self._streams.get(frame.stream):
                _deliver(frame, mailbox, self.replica_id)
        elif frame.kind == Kind.LOAD and isinstance(frame.content, int):
            self.others = frame.content
            self._on_change()
        elif frame.kind == Kind.LEAVING:
            self.leaving = True
            self._on_change()
        elif frame.kind != Kind.PONG:
            raise FrameError(f"a frame of kind {frame.kind} from a replica")

    def _greet(self, frame: Frame) -> None:
        if not self._expected:
            content, self._expected = handshake.answer_hello(frame, self._secret, self.replica_id, self._nonce)
            self._out.send(encode(Kind.PROOF, 0, content))
            return
        self.slots, self.leaving = handshake.check_welcome(frame, self._expected)
        self._splitter.most_bytes = MOST_BYTES
        self.ready.set_result(None)

    def _ping(self) -> None:
        if self._unheard * PING_S > GONE_S:  # by pings, not by the clock: this process itself may have stood still
            logger.warning("replica %s has said nothing for %g s: the connection ends", self.replica_id, GONE_S)
            self.close()
            return
        self._unheard += 1
        if self.ready.done():
            self._out.send(encode(Kind.PING))
        self._pinging = self._loop.call_later(PING_S, self._ping)


def _deliver(frame: Frame, mailbox: Mailbox, replica_id: str) -> None:
    if frame.kind in (Kind.CHUNK, Kind.MESSAGE):
        mailbox.put(frame.content)
    elif frame.kind == Kind.END:
        mailbox.end()
    elif frame.kind == Kind.MOVED:
        mailbox.end(ReplicaLost(replica_id, moved=True))
    elif frame.kind == Kind.BUSY:
        mailbox.end(Busy())
    elif frame.kind == Kind.FAILED:
        mailbox.end(CallFailed())
    else:
        raise FrameError(f"a frame of kind {frame.kind} in a stream")
