"""A gateway whose rates are decided by an actor goes on by itself while that is away, and tells it afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from serve.deploy.rates import BEAT_S, Ask, End, RatesActor, SharedRates
from serve.keys.limiter import Verdict
from serve.keys.limits import Limits

TWO = Limits(concurrency=2)


class Reached(SharedRates):
    """A gateway that reaches an actor in this process, or does not."""

    def __init__(self) -> None:
        super().__init__("endpoint", "gateway")
        self.actor = RatesActor()
        self.is_away = False

    async def _asked(self, ends: list[End], asks: list[Ask], running: dict[str, int] | None) -> list[Verdict]:
        await asyncio.sleep(0)
        if self.is_away:
            raise ConnectionError
        return self.actor.exchange("gateway", ends, asks, running)

    async def refused_by(self, limits: Limits = TWO, tokens: int = 10) -> str | None:
        return (await self.begin("alice", limits, tokens)).refused_by


def with_rates(scenario: Callable[[Reached], Awaitable[None]]) -> None:
    async def inside() -> None:
        rates = Reached()
        rates.start()
        await scenario(rates)
        rates.stop()

    asyncio.run(inside())


def test_requests_that_end_while_the_actor_is_away_make_room_for_others() -> None:
    async def scenario(rates: Reached) -> None:
        rates.is_away = True
        for _ in range(5):
            assert await rates.refused_by() is None
            rates.end("alice", 10, 5)
        assert [await rates.refused_by() for _ in range(3)] == [None, None, "concurrency"]

    with_rates(scenario)


def test_what_the_actor_admitted_counts_while_it_is_away() -> None:
    async def scenario(rates: Reached) -> None:
        assert [await rates.refused_by() for _ in range(2)] == [None, None]
        rates.is_away = True
        assert await rates.refused_by() == "concurrency"
        rates.end("alice", 0, 5)
        assert await rates.refused_by() is None

    with_rates(scenario)


def test_an_actor_that_is_back_knows_what_began_and_ended_meanwhile() -> None:
    async def scenario(rates: Reached) -> None:
        assert [await rates.refused_by() for _ in range(2)] == [None, None]
        rates.is_away = True
        for _ in range(2):
            rates.end("alice", 0, 5)
        assert await rates.refused_by() is None
        rates.is_away = False
        assert [await rates.refused_by() for _ in range(2)] == [None, "concurrency"]

    with_rates(scenario)


def test_tokens_that_were_not_used_come_back_while_the_actor_is_away() -> None:
    async def scenario(rates: Reached) -> None:
        limits = Limits(tokens_per_minute=100)
        rates.is_away = True
        for _ in range(5):
            verdict = await rates.begin("alice", limits, 90)
            assert verdict.refused_by is None
            rates.end("alice", verdict.reserved, 1)

    with_rates(scenario)


@pytest.mark.parametrize("is_away", [False, True])
def test_a_client_that_leaves_as_it_is_admitted_holds_nothing(is_away: bool) -> None:
    async def scenario(rates: Reached) -> None:
        rates.is_away = is_away
        for _ in range(3):
            asks = asyncio.create_task(rates.begin("alice", TWO, 10))
            while not rates._running["alice"]:
                await asyncio.sleep(0)
            asks.cancel()  # after the decision, before its task has gone on
            with pytest.raises(asyncio.CancelledError):
                await asks
        assert [await rates.refused_by() for _ in range(3)] == [None, None, "concurrency"]

    with_rates(scenario)


def test_a_gateway_that_is_idle_afterwards_tells_that_nothing_is_in_flight() -> None:
    async def scenario(rates: Reached) -> None:
        assert await rates.refused_by() is None
        rates.is_away = True
        rates.end("alice", 0, 5)
        while rates._ends:
            await asyncio.sleep(0.01)  # the exchange that would tell of the end fails
        rates.is_away = False
        await asyncio.sleep(2.5 * BEAT_S)
        (verdict,) = rates.actor.exchange("another", [], [Ask("alice", Limits(concurrency=1), 10)], None)
        assert verdict.refused_by is None

    with_rates(scenario)
