"""Pacing: nothing is lost or reordered, the first delta goes at once, failures and closing go through."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from serve.engines.pacing import interval_s, paced
from serve.engines.protocol import Delta, EngineError


def delta(number: int, last: bool = False) -> Delta:
    return Delta(f"{number},", (number,), "stop" if last else None, 3, number + 1)


class Source:
    """Gives `count` deltas, one at each turn of the event loop, and records how it ended."""

    def __init__(self, count: int, failure: Exception | None = None) -> None:
        self.count = count
        self.failure = failure
        self.given = 0
        self.closed = False

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        try:
            for number in range(self.count):
                await asyncio.sleep(0)
                self.given += 1
                yield delta(number, last=number == self.count - 1)
            if self.failure:
                raise self.failure
        finally:
            self.closed = True


async def collected(source: Source, interval_s: float) -> list[Delta]:
    return [part async for part in paced(source.deltas(), lambda: interval_s)]


@pytest.mark.parametrize("interval_s", [0.0, 0.01, 60.0])
def test_nothing_is_lost(interval_s: float) -> None:
    parts = asyncio.run(collected(Source(50), interval_s))
    assert "".join(part.text for part in parts) == "".join(f"{number}," for number in range(50))
    assert [token for part in parts for token in part.token_ids] == list(range(50))
    assert (parts[-1].finish_reason, parts[-1].completion_tokens) == ("stop", 50)
    assert [part.finish_reason for part in parts[:-1]] == [None] * (len(parts) - 1)


def test_a_long_interval_joins_all_but_the_first() -> None:
    assert len(asyncio.run(collected(Source(50), 60.0))) == 2


def test_an_empty_stream_ends() -> None:
    assert asyncio.run(collected(Source(0), 60.0)) == []


def test_a_failure_comes_after_what_was_given() -> None:
    seen: list[int] = []

    async def scenario() -> None:
        async for part in paced(Source(5, EngineError("gone")).deltas(), lambda: 60.0):
            seen.extend(part.token_ids)

    with pytest.raises(EngineError, match="gone"):
        asyncio.run(scenario())
    assert seen == [0, 1, 2, 3, 4]


def test_closing_closes_the_source() -> None:
    async def scenario() -> None:
        source = Source(1_000_000)
        stream = paced(source.deltas(), lambda: 0.0)
        await anext(stream)
        await stream.aclose()
        given = source.given
        await asyncio.sleep(0.01)
        assert source.closed
        assert source.given == given < 1_000_000

    asyncio.run(scenario())


def test_more_streams_wait_longer_up_to_a_bound() -> None:
    assert interval_s(0) == 0
    assert 0 < interval_s(1) < interval_s(16) < interval_s(64)
    assert interval_s(1) < 0.002, "one stream goes token by token"
    assert interval_s(200) == interval_s(640) < 0.5
