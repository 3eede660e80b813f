"""A budget ends what runs, however long it has run, and is not promised to more requests than it has tokens for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from serve.api.admission import Admission, estimate
from serve.api.body import ApiError
from serve.api.callers import Caller
from serve.api.own_rates import OwnRates
from serve.fair.turns import Turns
from serve.keys.limits import Limits
from serve.keys.meter import FIRST_TOKENS, FORGET_S, Meter
from serve.keys.store import Store

ALICE = Caller("alice", Limits(tokens_per_day=1_000))


class Gateway:
    """The admission of one gateway, and a clock that is the test's."""

    def __init__(self, folder: Path, window: int) -> None:
        self.now = 0.0
        self.meter = Meter(Store(f"sqlite:///{folder / 'keys.db'}"), folder / "usage", clock=lambda: self.now)
        turns = Turns(window, 256, 128)
        self.admission = Admission(OwnRates(), self.meter, lambda model: turns, 60.0)

    async def look_after(self, seconds: float) -> None:
        """Do what the meter does each second, so much later."""
        self.now += seconds
        await self.meter._exchange(self.meter._recent())


@pytest.fixture
def with_gateway(tmp_path: Path) -> Callable[..., None]:
    def run(scenario: Callable[[Gateway], Awaitable[None]], window: int = 4) -> None:
        async def inside() -> None:
            gateway = Gateway(tmp_path, window)
            await scenario(gateway)
            assert gateway.meter.held("alice") == 0, "what was held back is given back"
            await gateway.meter.stop()

        asyncio.run(inside())

    return run


def test_an_answer_that_takes_minutes_ends_at_its_budget(with_gateway: Callable[..., None]) -> None:
    async def scenario(gateway: Gateway) -> None:
        async def answer() -> None:
            with await gateway.admission.begin(ALICE, "m", 10, 10**5) as ticket:
                ticket.prompt(10)
                for written in range(50, 2_000, 50):
                    await gateway.look_after(10.0)
                    ticket.answer(written)

        with pytest.raises(ApiError) as ended:
            await answer()
        assert ended.value.code == "insufficient_quota"
        assert gateway.now == 210 > 3 * FORGET_S  # 10 of the prompt and 20 times 50 are the first above 1,000

    with_gateway(scenario)


def test_a_key_is_forgotten_a_while_after_its_last_request(with_gateway: Callable[..., None]) -> None:
    async def scenario(gateway: Gateway) -> None:
        with await gateway.admission.begin(ALICE, "m", 10, 10):
            gateway.now = 10 * FORGET_S
            assert gateway.meter._recent() == ["alice"]
        gateway.now += FORGET_S
        assert gateway.meter._recent() == ["alice"]
        gateway.now += 1
        assert gateway.meter._recent() == []

    with_gateway(scenario)


def test_prompts_that_come_at_once_are_held_against_the_budget(with_gateway: Callable[..., None]) -> None:
    async def scenario(gateway: Gateway) -> None:
        refused: list[ApiError] = []

        async def one() -> None:
            try:
                with await gateway.admission.begin(ALICE, "m", 300, 16) as ticket:
                    await asyncio.sleep(0)
                    ticket.prompt(310)
                    await asyncio.sleep(0)
            except ApiError as error:
                refused.append(error)

        await gateway.meter.left("alice", ALICE.limits)
        await asyncio.gather(*(one() for _ in range(128)))
        assert {(each.status, each.code, each.headers["retry-after"]) for each in refused} == {
            (429, "rate_limit_exceeded", "1")
        }
        assert len(refused) == 124, "four of 316 fill a thousand"
        assert gateway.meter.left_now("alice", ALICE.limits) == 1_000 - 4 * 310
        with pytest.raises(ApiError) as spent:
            await gateway.admission.begin(ALICE, "m", 1, 1)
        assert spent.value.code == "insufficient_quota"

    with_gateway(scenario)


def test_what_is_counted_is_held_no_more(with_gateway: Callable[..., None]) -> None:
    async def scenario(gateway: Gateway) -> None:
        meter = gateway.meter
        with await gateway.admission.begin(ALICE, "m", *estimate(400, 500, 1)) as ticket:
            assert meter.held("alice") == 100 + FIRST_TOKENS
            ticket.prompt(90)
            assert meter.held("alice") == FIRST_TOKENS
            ticket.answer(FIRST_TOKENS - 1)
            assert meter.held("alice") == 1
            ticket.answer(500)
            assert meter.held("alice") == 0
        assert meter.left_now("alice", ALICE.limits) == 1_000 - 590

    with_gateway(scenario)


def test_who_is_refused_or_leaves_while_it_waits_holds_nothing(with_gateway: Callable[..., None]) -> None:
    async def scenario(gateway: Gateway) -> None:
        narrow = Caller("alice", Limits(tokens_per_day=1_000, requests_per_minute=2))
        with await gateway.admission.begin(narrow, "m", 10, 0):
            waits = asyncio.create_task(gateway.admission.begin(narrow, "m", 10, 0))
            await asyncio.sleep(0.01)
            assert gateway.meter.held("alice") == 20
            waits.cancel()
            await asyncio.gather(waits, return_exceptions=True)
            assert gateway.meter.held("alice") == 10
            with pytest.raises(ApiError, match="requests a minute"):
                await gateway.admission.begin(narrow, "m", 10, 0)
            assert gateway.meter.held("alice") == 10

    with_gateway(scenario, window=1)


def test_a_row_of_predictions_is_a_token_whatever_its_bytes(with_gateway: Callable[..., None]) -> None:
    async def scenario(gateway: Gateway) -> None:
        caller = Caller("alice", Limits(tokens_per_minute=100, tokens_per_day=1_000))
        with await gateway.admission.begin(caller, "m", *estimate(1_000_000, 0, 1), rows=3) as ticket:
            assert (ticket.reserved, gateway.meter.held("alice")) == (3, 3)
            ticket.predicted(3)
            assert ticket.used == 3
        assert gateway.meter.left_now("alice", caller.limits) == 997

    with_gateway(scenario)
