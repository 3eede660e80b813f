"""Fewer, larger messages: each one on its way to the client costs Ray Serve about two milliseconds of CPU."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from serve.engine import Delta

MESSAGES_PER_SECOND = 400
"""What one replica sends at most, all its streams together. One stream is sent token by token; 32 streams get a
message each 80 ms, which holds all the tokens of that time."""


async def paced(deltas: AsyncGenerator[Delta, None], interval_s: Callable[[], float]) -> AsyncGenerator[Delta, None]:
    """Join deltas that come within `interval_s()` of the last one sent. The first and the last are never held up.

    Closing it closes `deltas`; what `deltas` raises is raised after everything it gave.
    """
    waiting: list[Delta] = []
    arrived, ended = asyncio.Event(), asyncio.Event()
    reader = asyncio.create_task(_read(deltas, waiting, arrived, ended))
    clock = asyncio.get_running_loop().time
    sent_at = -1e9
    try:
        while not (ended.is_set() and not waiting):
            await arrived.wait()
            await _sleep_until(ended, sent_at + interval_s() - clock())
            arrived.clear()
            if waiting:
                sent_at = clock()
                yield _joined(waiting)
        await reader
    finally:
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)


async def _read(
    deltas: AsyncGenerator[Delta, None], waiting: list[Delta], arrived: asyncio.Event, ended: asyncio.Event
) -> None:
    try:
        async with aclosing(deltas):
            async for delta in deltas:
                waiting.append(delta)
                arrived.set()
    finally:
        ended.set()
        arrived.set()


async def _sleep_until(ended: asyncio.Event, pause_s: float) -> None:
    if pause_s > 0 and not ended.is_set():
        try:
            await asyncio.wait_for(ended.wait(), pause_s)
        except asyncio.TimeoutError:
            return


def _joined(waiting: list[Delta]) -> Delta:
    """Take everything out of `waiting`, as one delta."""
    deltas, waiting[:] = list(waiting), []
    last = deltas[-1]
    token_ids = tuple(token for delta in deltas for token in delta.token_ids)
    text = "".join(delta.text for delta in deltas)
    return Delta(text, token_ids, last.finish_reason, last.prompt_tokens, last.completion_tokens)
