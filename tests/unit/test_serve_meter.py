"""What is counted reaches the store, whoever dies; and budgets are known over gateways."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pytest

from serve.keys.ledger import Used
from serve.keys.limits import Limits
from serve.keys.meter import Meter, today
from serve.keys.store import Store

DAILY = Limits(tokens_per_day=100)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(f"sqlite:///{tmp_path / 'keys.db'}")


def use(meter: Meter, tokens: int, key: str = "alice") -> None:
    meter.count(key, meter.begin(key, "chat"), generated_tokens=tokens)


def with_meters(store: Store, folder: Path, scenario: Callable[[Meter, Meter], Awaitable[None]]) -> None:
    async def inside() -> None:
        meters = Meter(store, folder), Meter(store, folder)
        await scenario(*meters)
        for meter in meters:
            await meter.stop()

    asyncio.run(inside())


def test_everything_is_in_the_store_when_a_meter_stops(store: Store, tmp_path: Path) -> None:
    async def scenario(one: Meter, other: Meter) -> None:
        for meter in (one, other):
            use(meter, 10)
            use(meter, 5, "bob")

    with_meters(store, tmp_path / "usage", scenario)
    assert store.usage() == [Used("alice", "chat", today(), 2, 0, 20), Used("bob", "chat", today(), 2, 0, 10)]
    assert list((tmp_path / "usage").iterdir()) == []


def test_a_killed_gateway_is_settled_by_the_next_one(store: Store, tmp_path: Path) -> None:
    child = os.fork()
    if not child:
        use(Meter(Store(str(store._engine.url)), tmp_path / "usage"), 42)
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert store.usage() == []

    async def scenario(one: Meter, other: Meter) -> None:
        for meter in (one, other):
            meter.start()
        await asyncio.sleep(0.3)

    with_meters(store, tmp_path / "usage", scenario)
    assert store.usage() == [Used("alice", "chat", today(), 1, 0, 42)]


def test_a_budget_is_followed_here_at_once_and_elsewhere_after_a_flush(store: Store, tmp_path: Path) -> None:
    async def scenario(one: Meter, other: Meter) -> None:
        assert await one.left("alice", DAILY) == 100
        use(one, 30)
        assert await one.left("alice", DAILY) == 70
        assert await other.left("alice", DAILY) == 100  # not written yet
        await one._exchange([])
        await other._exchange(["alice"])
        use(other, 60)
        assert other.left_now("alice", DAILY) == 10
        await other._exchange(["alice"])
        assert other.left_now("alice", DAILY) == 10  # written, and not counted twice
        await one._exchange(["alice"])
        assert one.left_now("alice", DAILY) == 10
        use(one, 15)
        assert one.left_now("alice", DAILY) == -5

    with_meters(store, tmp_path / "usage", scenario)


def test_the_tighter_of_two_budgets_counts(store: Store, tmp_path: Path) -> None:
    async def scenario(one: Meter, other: Meter) -> None:
        assert await one.left("alice", Limits(tokens_per_day=100, tokens_per_month=40)) == 40
        assert await one.left("alice", Limits()) is None

    with_meters(store, tmp_path / "usage", scenario)


def test_a_store_that_is_away_loses_nothing(store: Store, tmp_path: Path) -> None:
    class Away(Exception):
        pass

    class Broken(Store):
        def __init__(self) -> None:
            self.away = True

        def write_usage(self, *arguments) -> None:
            if self.away:
                raise Away
            store.write_usage(*arguments)

        def close_ledger(self, *arguments) -> None:
            store.close_ledger(*arguments)

    broken = Broken()

    async def scenario(one: Meter, other: Meter) -> None:
        use(one, 10)
        with pytest.raises(Away):
            await one._exchange([])
        use(one, 1, "bob")
        broken.away = False
        await one._exchange([])
        assert [used.key for used in store.usage()] == ["alice", "bob"]

    with_meters(broken, tmp_path / "usage", scenario)


class Gated(Store):
    """A store whose first write waits until the test lets it go on."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.reached, self.goes_on = threading.Event(), threading.Event()

    def write_usage(self, ledger: str, totals: Sequence[Used]) -> None:
        if not self.reached.is_set():
            self.reached.set()
            assert self.goes_on.wait(10)
        super().write_usage(ledger, totals)

    def tokens(self) -> int:
        return sum(used.tokens for used in self.usage())


@pytest.fixture
def gated(tmp_path: Path) -> Gated:
    return Gated(f"sqlite:///{tmp_path / 'keys.db'}")


def test_a_client_that_leaves_while_its_budget_is_read_takes_back_no_counts(gated: Gated, tmp_path: Path) -> None:
    async def scenario(one: Meter, _: Meter) -> None:
        use(one, 10)
        asks = asyncio.create_task(one.left("alice", DAILY))
        await asyncio.to_thread(gated.reached.wait, 10)
        asks.cancel()
        await asyncio.wait({asks})
        use(one, 90)
        later = asyncio.create_task(one._exchange([]))
        await asyncio.sleep(0.02)
        assert not later.done(), "writes are one after another"
        gated.goes_on.set()
        await later
        assert gated.tokens() == 100

    with_meters(gated, tmp_path / "usage", scenario)


def test_a_gateway_that_stops_while_it_writes_counts_once(gated: Gated, tmp_path: Path) -> None:
    async def inside() -> None:
        meter = Meter(gated, tmp_path / "usage")
        use(meter, 101)
        meter.start()
        await asyncio.to_thread(gated.reached.wait, 10)
        stops = asyncio.create_task(meter.stop())
        await asyncio.sleep(0.02)
        gated.goes_on.set()
        await stops

    asyncio.run(inside())  # which waits for threads
    assert gated.tokens() == 101
    assert list((tmp_path / "usage").iterdir()) == []
