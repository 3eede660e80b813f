"""A gateway whose rates are decided by an actor goes on by itself while that is away, and tells it afterwards."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from serve.deploy import rates as rates_module
from serve.deploy import succession
from serve.deploy.rates import BEAT_S, SHAPE, Ask, RatesActor, SharedRates, StrangeShape
from serve.deploy.shapes import seal, unseal
from serve.keys.limiter import RateLimits, Verdict
from serve.keys.limits import Limits
from tests.support.handles import Handle

TWO = Limits(concurrency=2)
NAME, NEXT = succession.names("rates:endpoint")


class Reached(SharedRates):
    """A gateway that reaches the actors in this process, or does not."""

    def __init__(self, gateway: str = "gateway") -> None:
        super().__init__("endpoint", gateway)
        self.is_away = False

    async def _answer_of(self, question: tuple[Any, ...]) -> Any:
        if self.is_away:
            raise ConnectionError
        return await super()._answer_of(question)

    async def refused_by(self, limits: Limits = TWO, tokens: int = 10, texts: int = 1) -> str | None:
        return (await self.begin("alice", limits, tokens, texts)).refused_by


def verdicts(actor: RatesActor, *asks: Ask, gateway: str = "another") -> list[Verdict]:
    answer = actor.exchange(gateway, SHAPE, seal(([], asks)), None)
    assert isinstance(answer, bytes)
    found: list[Verdict] = unseal(answer)
    return found


def told_of(actor: RatesActor, key: str) -> dict[str, int]:
    keys = actor._limiter.told(asyncio.get_running_loop().time())["keys"]
    return dict(keys[key]["running"]) if key in keys else {}


@pytest.fixture(autouse=True)
def found_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(succession, "named", lambda name: FOUND.get(name))


FOUND: dict[str, Handle] = {}
"""The actors that Ray would find."""


def with_rates(scenario: Callable[[Reached], Awaitable[None]]) -> None:
    async def inside() -> None:
        rates = Reached()
        FOUND.clear()
        FOUND[NAME] = Handle(RatesActor())
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
        (verdict,) = verdicts(FOUND[NAME].actor, Ask("alice", RateLimits(None, None, 1), 10))
        assert verdict.refused_by is None

    with_rates(scenario)


def test_a_gateway_alone_goes_on_from_where_a_key_stood() -> None:
    async def scenario(rates: Reached) -> None:
        limits = Limits(requests_per_minute=3, tokens_per_minute=100)
        assert [await rates.refused_by(limits) for _ in range(2)] == [None, None]
        rates.is_away = True
        assert [await rates.refused_by(limits) for _ in range(2)] == [None, "requests_per_minute"]

    with_rates(scenario)


async def succeeded() -> RatesActor:
    """Have another actor take over, as `serve up` does, but for the end of the first one."""
    successor = RatesActor("new")
    FOUND[NEXT] = Handle(successor)
    before = FOUND[NAME].actor
    told = before.hand_over(NEXT)
    successor._limiter.take(asyncio.get_running_loop().time(), told["limiter"])
    return successor


@pytest.mark.parametrize("is_ended", [False, True], ids=["lives", "is ended"])
def test_limits_hold_while_another_actor_takes_over_and_the_first_one(is_ended: bool) -> None:
    minute = Limits(requests_per_minute=4, concurrency=3)

    async def scenario(rates: Reached) -> None:
        assert [await rates.refused_by(minute) for _ in range(2)] == [None, None]
        successor = await succeeded()
        if is_ended:
            FOUND.pop(NAME).lives = False
        assert [await rates.refused_by(minute) for _ in range(2)] == [None, "concurrency"]
        for _ in range(3):
            rates.end("alice", 0, 5)
        assert [await rates.refused_by(minute) for _ in range(2)] == [None, "requests_per_minute"]
        (verdict,) = verdicts(successor, Ask("alice", RateLimits(None, None, 1), 10))
        assert verdict.refused_by == "concurrency", "it was decided there, and not by the gateway alone"

    with_rates(scenario)


def test_a_request_for_several_texts_counts_as_many_at_the_actor_and_alone() -> None:
    async def scenario(rates: Reached) -> None:
        limits = Limits(concurrency=4)
        assert await rates.refused_by(limits, texts=3) is None
        assert await rates.refused_by(limits, texts=2) == "concurrency"
        rates.is_away = True
        assert await rates.refused_by(limits, texts=2) == "concurrency"
        rates.end("alice", 10, 5, texts=3)
        assert await rates.refused_by(limits, texts=4) is None

    with_rates(scenario)


def test_an_actor_that_does_not_know_the_questions_counts_what_is_in_flight_and_the_gateway_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rates_module, "AWAY_S", 0.01)
    actor = RatesActor()
    own = rates_module.SHAPE

    class Older(Reached):
        async def _answer_of(self, question: tuple[Any, ...]) -> Any:
            gateway, _, _, running = question
            return await super()._answer_of((gateway, "of another version", b"no pickle of ours", running))

    async def scenario() -> None:
        FOUND.clear()
        FOUND[NAME] = Handle(actor)
        rates = Older()
        rates.start()
        assert [await rates.refused_by() for _ in range(3)] == [None, None, "concurrency"], "it counts alone"
        while told_of(actor, "alice") != {"gateway": 2}:
            await asyncio.sleep(0.01)  # until its next beat: an exchange before the second request tells of one
        (verdict,) = verdicts(actor, Ask("alice", RateLimits(None, None, 2), 10))
        assert verdict.refused_by == "concurrency"
        rates.stop()

    with caplog.at_level(logging.WARNING, "serve"):
        asyncio.run(scenario())
    assert "another version of Tandem" in caplog.text
    assert own in caplog.text
    assert StrangeShape.__name__ not in caplog.text, "a sentence, and not the name of an exception"
