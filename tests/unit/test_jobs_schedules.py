"""Learning-rate schedules at their corners."""

import itertools

import pytest

from jobs.spec import TrainingSpec
from jobs.worker.schedules import learning_rate


def rates(schedule: str, **settings) -> list[float]:
    training = TrainingSpec(steps=100, learning_rate=1.0, schedule=schedule, warmup_steps=10, **settings)
    return [learning_rate(training, step, 100) for step in range(100)]


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "warmup-stable-decay"])
def test_warm_up_rises_linearly_to_the_peak(schedule):
    assert rates(schedule)[:10] == pytest.approx([0.1 * i for i in range(1, 11)])


def test_cosine_is_half_way_in_the_middle_and_ends_low():
    curve = rates("cosine", min_learning_rate=0.1)
    assert curve[55] == pytest.approx(0.55)
    assert curve[99] == pytest.approx(0.1, abs=1e-3)


def test_linear_falls_by_the_same_amount_each_step():
    curve = rates("linear")[10:]
    assert [a - b for a, b in itertools.pairwise(curve)] == pytest.approx([1 / 90] * 89)


def test_warmup_stable_decay_is_flat_then_falls():
    curve = rates("warmup-stable-decay", decay_steps=20)
    assert set(curve[10:81]) == {1.0}
    assert curve[90] == pytest.approx(0.5)


def test_constant_stays():
    assert set(rates("constant")[10:]) == {1.0}
