"""The response that is a stream of events."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.responses import StreamingResponse
from starlette.types import Send


class EventStream(StreamingResponse):
    """Server-sent events. Whatever ends them closes their source at once, and with it frees what it held.

    Without this a client that leaves while something is sent would hold a slot until the source is collected.
    """

    media_type = "text/event-stream"

    async def stream_response(self, send: Send) -> None:
        assert isinstance(self.body_iterator, AsyncGenerator)
        async with aclosing(self.body_iterator):
            await super().stream_response(send)
