"""A gateway's sums of work: what arrives is what is done in the end, whatever was expected."""

from __future__ import annotations

import random

import pytest

from serve.scaling.work import FIRST_GUESS, ModelWork
from serve.wire import Work


def test_one_text_from_its_arrival_to_its_end() -> None:
    work = ModelWork()
    item = work.begin(prompt=10, most=20)
    assert work.told() == Work(30, 0, 30, 0)
    item.started(prompt=12)
    assert work.told() == Work(32, 12, 0, 20)
    item.generated(5)
    assert work.told() == Work(32, 17, 0, 15)
    item.end()
    assert work.told() == Work(17, 17, 0, 0)
    item.end()
    assert work.told() == Work(17, 17, 0, 0)


def test_ten_thousand_tokens_that_nobody_generates_are_expected_no_more() -> None:
    work = ModelWork()
    assert work.begin(0, most=10_000).needs == FIRST_GUESS
    for _ in range(40):
        item = work.begin(0, most=None)
        item.started()
        item.generated(8)
        item.end()
    assert work.begin(0, most=10_000).needs == pytest.approx(8, abs=1)
    assert work.begin(0, most=None).needs == pytest.approx(8, abs=1)
    assert work.begin(0, most=2).needs == 2


def test_what_is_generated_beyond_what_was_expected_has_arrived_as_well() -> None:
    work = ModelWork()
    item = work.begin(0, most=None)
    item.started(0)
    item.generated(int(FIRST_GUESS) + 100)
    assert work.told() == Work(FIRST_GUESS + 100, FIRST_GUESS + 100, 0, 0)


def test_one_that_leaves_before_a_replica_took_it_was_no_work() -> None:
    work = ModelWork()
    work.begin(5, 7).end(answered=False)
    assert work.told() == Work(0, 0, 0, 0)


def test_predictions_count_when_they_are_there() -> None:
    work = ModelWork()
    item = work.begin(4, 0)
    item.started()
    assert work.told() == Work(4, 0, 0, 4)
    item.started(6)  # vectors tell how many tokens the texts had
    item.end()
    assert work.told() == Work(6, 6, 0, 0)
    failed = work.begin(4, 0)
    failed.started()
    failed.end(answered=False)
    assert work.told() == Work(6, 6, 0, 0)


@pytest.mark.parametrize("seed", range(3))
def test_whatever_happens_in_between_all_that_arrived_is_done(seed: int) -> None:
    chance, work, items = random.Random(seed), ModelWork(), []
    for _ in range(2000):
        if chance.random() < 0.5 or not items:
            items.append((work.begin(chance.randint(0, 50), chance.choice([None, 0, 1, 40, 9000])), [0]))
        item, total = chance.choice(items)
        act = chance.randrange(4)
        if act == 0:
            item.started(chance.choice([None, 7]))
        elif act == 1:
            total[0] += chance.randint(0, 30)
            item.generated(total[0])
        elif act == 2:
            item.end(chance.random() < 0.8)
            items.remove((item, total))
        told = work.told()
        assert told.arrived - told.done == pytest.approx(told.waiting + told.running, abs=1e-6)
    for item, _ in items:
        item.end()
    told = work.told()
    assert (told.waiting, told.running) == (0, 0)
    assert told.arrived == pytest.approx(told.done, abs=1e-6)
