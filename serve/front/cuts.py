"""What a client is told of a request that is ended before its time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TypeVar

from serve.api.body import ApiError
from serve.front import exchange
from serve.front.exchange import Cut

Message = TypeVar("Message")


def told(cut: Cut | None) -> ApiError | None:
    """Return the error that says why; None where nobody is there to be told, or nothing was cut."""
    if cut == "expired":
        message = "the request's time was over before its answer was complete"
        return ApiError(408, message, code="deadline_exceeded", headers={"retry-after": "1"})
    if cut == "leaving":
        message = "the gateway ends, and has waited for this answer as long as it may; try again"
        return ApiError(503, message, code="gateway_leaving", headers={"retry-after": "1"})
    return None


async def in_words(stream: AsyncGenerator[Message, None]) -> AsyncGenerator[Message, None]:
    """Pass a stream on. Raises ApiError where its request is cut, so that an answer ends in its own form."""
    async with aclosing(stream):
        try:
            async for message in stream:
                yield message
        except asyncio.CancelledError:
            if error := told(exchange.current().cut):
                raise error from None
            raise
