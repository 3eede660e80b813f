"""As many slots are kept as keys that have used little turn out to need."""

from __future__ import annotations

import random

import pytest

from serve.fair.reserve import LEAST_SLOTS, MOST, SHORT_OF, Reserve


def test_it_begins_with_the_most_and_gives_back_what_is_not_needed() -> None:
    reserve = Reserve()
    assert reserve.of(20) == round(MOST * 20)
    for _ in range(2000):
        reserve.asked(20, found_one=True)
    assert reserve.of(20) == 1
    for _ in range(30):
        reserve.asked(20, found_one=False)
    assert reserve.of(20) == round(MOST * 20)


def test_of_few_slots_none_is_kept_and_fewer_slots_keep_fewer() -> None:
    reserve = Reserve()
    assert [reserve.of(slots) for slots in (0, 1, LEAST_SLOTS - 1, LEAST_SLOTS, 10)] == [0, 0, 0, 2, 4]


def test_it_settles_where_few_find_none() -> None:
    """Slots that are asked for and free are as many as a Poisson number of mean 4."""
    reserve, chance, missed = Reserve(), random.Random(3), []
    for _ in range(100_000):
        found = reserve.of(40) > _poisson(chance, 4.0)
        reserve.asked(40, found)
        missed.append(not found)
    assert sum(missed[4000:]) / len(missed[4000:]) == pytest.approx(SHORT_OF, rel=0.1)


def _poisson(chance: random.Random, mean: float) -> int:
    count, left = -1, mean
    while left > 0:
        left -= chance.expovariate(1.0)
        count += 1
    return count
