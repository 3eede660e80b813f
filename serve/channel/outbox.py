"""What goes out over a connection: everything that is said within one turn of the event loop leaves in one send.

A step of an engine gives a token to each of its streams; sent one by one they would cost a system call each.
"""

from __future__ import annotations

import asyncio


class Outbox:
    """The sending side of one connection. Its methods are called on the connection's event loop."""

    def __init__(self, transport: asyncio.WriteTransport) -> None:
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._waiting: list[bytes] = []

    def send(self, frame: bytes) -> None:
        """Send a frame at the end of this turn of the event loop."""
        if not self._waiting:
            self._loop.call_soon(self.flush)
        self._waiting.append(frame)

    def flush(self) -> None:
        """Send what waits."""
        if self._waiting and not self._transport.is_closing():
            self._transport.write(b"".join(self._waiting))
        self._waiting.clear()
