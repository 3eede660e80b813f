"""How many bytes of bodies a gateway holds at the same time."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from starlette.requests import ClientDisconnect, Request

from serve.api.aside import LARGE
from serve.api.bodies import Bodies
from serve.api.body import ApiError

MOST = 2 * LARGE
ROOM = 8 * LARGE


def request(parts: list[bytes], last: Callable[[], Awaitable[Any]], coding: str = "") -> Request:
    left = list(parts)

    async def receive() -> Any:
        if left:
            return {"type": "http.request", "body": left.pop(0), "more_body": True}
        return await last()

    headers = [(b"content-encoding", coding.encode())] if coding else []
    return Request({"type": "http", "headers": headers}, receive)


async def ended() -> Any:
    return {"type": "http.request", "body": b"", "more_body": False}


async def gone() -> Any:
    return {"type": "http.disconnect"}


async def never() -> Any:
    await asyncio.Event().wait()


async def read(bodies: Bodies, asked: Request) -> int:
    async with bodies.of(asked) as raw:
        return len(raw)


async def holding(bodies: Bodies, count: int, size: int) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(read(bodies, request([b"a" * size], never))) for _ in range(count)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    yield
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def test_bodies_that_never_end_leave_room_for_small_ones() -> None:
    async def scenario() -> None:
        bodies = Bodies(MOST, ROOM)
        async for _ in holding(bodies, 3, MOST):
            assert bodies.room.held == 3 * MOST
            with pytest.raises(ApiError) as refused:
                await read(bodies, request([b"a" * (LARGE + 1)], ended))
            assert (refused.value.status, refused.value.code) == (503, "too_many_bodies")
            assert refused.value.headers == {"retry-after": "1"}
            assert await read(bodies, request([b"a" * LARGE], ended)) == LARGE
            async for _ in holding(bodies, 2, LARGE):
                with pytest.raises(ApiError):
                    await read(bodies, request([b"a"], ended))
        assert bodies.room.held == 0
        assert await read(bodies, request([b"a" * MOST], ended)) == MOST

    asyncio.run(scenario())


def test_what_is_unpacked_counts_and_whatever_happens_is_given_back() -> None:
    async def scenario() -> None:
        bodies = Bodies(MOST, ROOM)
        packed = gzip.compress(b"a" * MOST)
        async with bodies.of(request([packed], ended, "gzip")):
            assert bodies.room.held == MOST
        for asked, error in (
            (request([b"a" * (MOST + 1)], ended), ApiError),
            (request([b"a" * 100], gone), ClientDisconnect),
            (request([packed, b"broken"], ended, "gzip"), ApiError),
        ):
            with pytest.raises(error):
                await read(bodies, asked)
            assert bodies.room.held == 0

    asyncio.run(scenario())


def test_two_of_the_largest_have_room_in_any_case() -> None:
    async def scenario() -> None:
        bodies = Bodies(MOST, 1)
        async for _ in holding(bodies, 1, MOST):
            assert await read(bodies, request([b"a" * MOST], ended)) == MOST

    asyncio.run(scenario())
