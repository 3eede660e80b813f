"""Requests are let through as replicas can take them, in the fair order, and never wait longer than they may."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable

import pytest

from serve.fair.queue import SAVED
from serve.fair.turns import LEAST_SEEN, PACE_S, RECENT_S, Busy, Pace, Turn, Turns


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(scenario())


async def take(turns: Turns, key: str = "a", patience_s: float = 5.0, cost: float = 10) -> Turn:
    return await turns.take(key, 1, cost, patience_s)


def test_what_fits_is_let_through_at_once_and_the_rest_in_turn() -> None:
    async def scenario() -> None:
        turns = Turns(2, 10, 10)
        first, _ = await take(turns), await take(turns)
        third = asyncio.create_task(take(turns))
        await asyncio.sleep(0)
        assert (turns.running, turns.waiting, third.done()) == (2, 1, False)
        turns.end(first)
        assert (await third).key == "a"
        assert (turns.running, turns.waiting) == (2, 0)

    run(scenario)


def test_a_wider_window_lets_those_that_wait_through() -> None:
    async def scenario() -> None:
        turns = Turns(0, 10, 10)
        tasks = [asyncio.create_task(take(turns)) for _ in range(3)]
        await asyncio.sleep(0)
        turns.widen(2)
        await asyncio.sleep(0.01)
        assert [task.done() for task in tasks] == [True, True, False]
        turns.widen(3)
        await asyncio.gather(*tasks)

    run(scenario)


def test_keys_take_turns() -> None:
    order: list[str] = []

    async def scenario() -> None:
        turns = Turns(1, 100, 100)

        async def one(key: str) -> None:
            turn = await take(turns, key, cost=300)
            order.append(key)
            await asyncio.sleep(0)
            turns.end(turn)

        await asyncio.gather(*(one("big") for _ in range(10)), *(one("small") for _ in range(3)))
        assert turns.running == turns.waiting == 0

    run(scenario)
    assert order.index("small") <= 2
    assert [key for key in order[:7]].count("small") == 3


def test_who_waits_too_long_is_told_so() -> None:
    async def scenario() -> None:
        turns = Turns(0, 10, 10)
        with pytest.raises(Busy, match=r"within 0\.05 s"):
            await take(turns, patience_s=0.05)
        assert turns.waiting == 0

    run(scenario)


def test_who_would_wait_too_long_is_told_at_once() -> None:
    now = 0.0

    async def scenario() -> None:
        nonlocal now
        turns = Turns(1, 300, 300, clock=lambda: now)
        turn = await take(turns)
        waiting = deque(asyncio.create_task(take(turns, patience_s=1e6)) for _ in range(220))
        await asyncio.sleep(0)
        for _ in range(200):  # one a second leaves
            now += 1
            turns.end(turn)
            turn = await waiting.popleft()
        with pytest.raises(Busy, match=r"20 texts go first, about 19 s") as busy:
            await take(turns, patience_s=10)
        assert busy.value.retry_after_s == 20
        for task in waiting:
            task.cancel()

    run(scenario)


def test_a_key_with_little_to_do_is_not_refused_for_what_another_has_waiting() -> None:
    now = 0.0

    async def scenario() -> None:
        nonlocal now
        turns = Turns(1, 300, 300, clock=lambda: now)
        turn = await take(turns, "big")
        waiting = deque(asyncio.create_task(take(turns, "big", patience_s=1e6)) for _ in range(120))
        await asyncio.sleep(0)
        for _ in range(100):  # one a second leaves
            now += 1
            turns.end(turn)
            turn = await waiting.popleft()
        for key, priority in (("big", 1), ("big", 2), ("small", 2)):
            with pytest.raises(Busy, match=r"20 texts go first, about 19 s"):
                await turns.take(key, priority, 10, patience_s=10)
        small = [asyncio.create_task(take(turns, "small", patience_s=10)) for _ in range(5)]
        high = [asyncio.create_task(turns.take("high", 0, 10, patience_s=5)) for _ in range(5)]
        await asyncio.sleep(0)
        assert (turns.waiting, any(task.done() for task in small + high)) == (30, False)
        with pytest.raises(Busy, match=r"16 texts go first"):
            await take(turns, "small", patience_s=10)
        for task in (*waiting, *small, *high):
            task.cancel()

    run(scenario)


def test_a_full_queue_is_refused_but_for_who_has_less_in_it() -> None:
    async def scenario() -> None:
        turns = Turns(0, 3, 2)
        first, second = [asyncio.create_task(take(turns, "a")) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Busy, match="2 requests of this key wait"):
            await take(turns, "a")
        third = asyncio.create_task(take(turns, "b"))
        await asyncio.sleep(0)
        fourth = asyncio.create_task(take(turns, "c"))
        with pytest.raises(Busy, match="its place was given") as busy:
            await second
        assert busy.value.retry_after_s == 1
        with pytest.raises(Busy, match="3 requests wait already"):
            await take(turns, "d")
        with pytest.raises(Busy, match="3 requests wait already"):
            await turns.take("d", 2, 10, 5)
        better = asyncio.create_task(turns.take("d", 0, 10, 5))
        await asyncio.sleep(0.01)
        assert [task.done() for task in (first, third, fourth, better)].count(True) == 1
        assert (turns.waiting, better.done()) == (3, False)
        for task in (first, third, fourth, better):
            task.cancel()
        await asyncio.gather(first, third, fourth, better, return_exceptions=True)

    run(scenario)


def test_a_request_for_several_texts_takes_as_many_places() -> None:
    async def scenario() -> None:
        turns = Turns(4, 10, 10)
        three = await turns.take("a", 1, 10, 5, weight=3)
        two, one = (asyncio.create_task(turns.take("a", 1, 10, 5, weight=weight)) for weight in (2, 1))
        await asyncio.sleep(0.01)
        assert (turns.running, two.done(), one.done()) == (3, False, False)
        turns.end(three)
        await asyncio.gather(two, one)
        assert turns.running == 3
        leaver = asyncio.create_task(turns.take("a", 1, 10, 5, weight=2))
        await asyncio.sleep(0)
        turns.end(await two)  # lets it through
        leaver.cancel()  # before it could see that
        await asyncio.gather(leaver, return_exceptions=True)
        assert turns.running == 1

    run(scenario)


def test_a_request_for_more_texts_than_the_window_goes_alone_and_is_not_starved() -> None:
    async def scenario() -> None:
        turns = Turns(4, 10, 10)
        small = [await take(turns), await take(turns)]
        heavy = asyncio.create_task(turns.take("b", 1, 10, 5, weight=9))
        await asyncio.sleep(0)
        later = [asyncio.create_task(take(turns)) for _ in range(4)]
        await asyncio.sleep(0)
        turns.end(small[0])
        await asyncio.sleep(0.01)
        assert (turns.running, heavy.done()) == (1, False)
        turns.end(small[1])
        turn = await heavy
        await asyncio.sleep(0.01)
        assert (turns.running, any(task.done() for task in later)) == (9, False)
        turns.end(turn)
        await asyncio.gather(*later)
        assert turns.running == 4

    run(scenario)


def test_when_a_heavy_request_leaves_those_behind_it_go() -> None:
    async def scenario() -> None:
        turns = Turns(4, 10, 10)
        await take(turns)
        heavy = asyncio.create_task(turns.take("b", 1, 10, 5, weight=9))
        await asyncio.sleep(0)
        later = asyncio.create_task(take(turns))
        await asyncio.sleep(0.01)
        assert not later.done()
        heavy.cancel()
        await later
        impatient = asyncio.create_task(turns.take("b", 1, 10, 0.02, weight=9))
        await asyncio.sleep(0)
        last = asyncio.create_task(take(turns))
        with pytest.raises(Busy, match="did not come"):
            await impatient
        await last
        assert (turns.running, turns.waiting) == (3, 0)

    run(scenario)


def test_a_smaller_bound_is_kept_as_soon_as_better_requests_come() -> None:
    async def scenario() -> None:
        turns = Turns(0, 10, 10)
        tasks = [asyncio.create_task(take(turns)) for _ in range(5)]
        await asyncio.sleep(0)
        turns.bound(2, 2)
        assert turns.waiting == 5
        better = asyncio.create_task(turns.take("b", 0, 10, 5))
        await asyncio.sleep(0.01)
        assert ([task.done() for task in tasks], better.done()) == ([False] + [True] * 4, False)
        assert turns.waiting == 2
        for task in (*tasks, better):
            task.cancel()
        await asyncio.gather(*tasks, better, return_exceptions=True)

    run(scenario)


def test_a_client_that_leaves_frees_its_place_in_the_queue_or_its_turn() -> None:
    async def scenario() -> None:
        turns = Turns(1, 10, 10)
        turn = await take(turns)
        leaver, stayer = asyncio.create_task(take(turns, "a")), asyncio.create_task(take(turns, "b"))
        await asyncio.sleep(0)
        leaver.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await leaver
        assert turns.waiting == 1
        turns.end(turn)
        assert (await stayer).key == "b"
        late = asyncio.create_task(take(turns, "c"))
        await asyncio.sleep(0)
        turns.end(Turn("b", 1))  # lets `late` through
        late.cancel()  # before it could see that
        with contextlib.suppress(asyncio.CancelledError):
            await late
        assert (turns.running, turns.waiting) == (0, 0)

    run(scenario)


def test_a_client_that_leaves_as_its_patience_ends_gives_back_no_turn_that_it_never_had() -> None:
    async def scenario() -> None:
        turns = Turns(1, 10, 10)
        turn = await take(turns, "a")
        leaver = asyncio.create_task(take(turns, "b", patience_s=0.01))
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_later(0.01, leaver.cancel)
        time.sleep(0.03)  # both timers are due in the same iteration of the loop
        with pytest.raises(asyncio.CancelledError):
            await leaver
        assert (turns.running, turns.waiting) == (1, 0)
        turns.end(turn)
        assert turns.running == 0

    run(scenario)


def test_the_pace_follows_what_leaves_while_others_wait() -> None:
    pace = Pace()
    pace.waits(0.0, True)
    for at in range(1, 500):
        assert (pace.per_s is None) == (at <= LEAST_SEEN)
        pace.left(at * 0.2)
        assert at < 50 or pace.per_s == pytest.approx(5, rel=0.05)
    pace.left(99.8 + PACE_S)
    assert pace.per_s == pytest.approx(5 / math.e + 1 / PACE_S, rel=0.05)


def test_time_in_which_none_waits_does_not_slow_the_pace() -> None:
    pace = Pace()
    for minute in range(100):
        pace.waits(60.0 * minute, True)
        pace.left(60.0 * minute + 0.5)
        pace.waits(60.0 * minute + 0.5, False)
        pace.left(60.0 * minute + 30)
    assert pace.per_s == pytest.approx(2, rel=0.05)


def test_a_first_burst_after_quiet_hours_is_not_refused() -> None:
    now = 0.0

    async def scenario() -> None:
        nonlocal now
        turns = Turns(20, 256, 128, clock=lambda: now)
        for _ in range(30):  # one a minute, each takes a second
            turn = await take(turns)
            now += 1
            turns.end(turn)
            now += 59
        tasks = [asyncio.create_task(take(turns, patience_s=60)) for _ in range(60)]
        served = 0
        while served < 60:
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert not [task for task in tasks if task.done() and task.exception()]
            running, now = [task.result() for task in tasks[served:] if task.done()], now + 1
            served += len(running)
            for turn in running:
                turns.end(turn)
        assert now == 30 * 60 + 3
        assert turns._pace.per_s == pytest.approx(20, rel=0.1)

    run(scenario)


def test_a_part_of_the_slots_is_kept_for_who_has_used_less_than_its_share() -> None:
    now = 0.0

    async def scenario() -> None:
        nonlocal now
        turns = Turns(13, 100, 100, clock=lambda: now, slots=10)
        big = [asyncio.create_task(take(turns, "big", cost=SAVED)) for _ in range(20)]
        await asyncio.sleep(0.01)
        assert (turns.running, turns.waiting) == (13, 7)  # nothing is kept from the only one
        small = asyncio.create_task(take(turns, "small"))
        for ended in range(4):
            await asyncio.sleep(0)
            assert not small.done()
            turns.end(big[ended].result())
        await small  # before what waits longer, and the next of big not before two more have ended
        for ended in range(4, 6):
            assert (turns.running, turns.waiting) == (14 - ended, 7)
            turns.end(big[ended].result())
            await asyncio.sleep(0.01)
        assert (turns.running, turns.waiting) == (8, 7)
        more = [asyncio.create_task(take(turns, "small")) for _ in range(3)]
        await asyncio.sleep(0.01)
        assert (turns.running, [task.done() for task in more]) == (10, [True, True, False])
        turns.charge(more[0].result(), SAVED)
        turns.end(big[6].result())
        await asyncio.sleep(0.01)
        assert (turns.running, more[2].done()) == (9, False)  # it is owed no more
        now += RECENT_S + 1
        turns.end(big[7].result())
        await asyncio.sleep(0.01)
        assert turns.running == 13  # as long ago as that, nobody is one of several
        for task in (*big, *more):
            task.cancel()
        await asyncio.gather(*big, *more, return_exceptions=True)

    run(scenario)


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_of_few_slots_none_is_kept(slots: int) -> None:
    async def scenario() -> None:
        turns = Turns(slots + 1, 100, 100, slots=slots)
        turns.end(await take(turns, "small"))
        waiting = [asyncio.create_task(take(turns, "big", cost=SAVED)) for _ in range(9)]
        await asyncio.sleep(0.01)
        assert turns.running == slots + 1
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    run(scenario)
