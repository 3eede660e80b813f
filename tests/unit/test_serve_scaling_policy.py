"""How many replicas: a step, a square wave, a pause, zero, and bounds, over looks a second apart."""

from __future__ import annotations

import itertools
import math

import pytest

from serve.scaling.policy import Look, WorkPolicy
from serve.scaling.steps import Bounds, Decision

SPEED = 500.0


class World:
    """Replicas of `SPEED` tokens a second, ready `start` looks after they were asked for, and a queue of tokens."""

    def __init__(self, policy: WorkPolicy, ready: int = 1, start: int = 0) -> None:
        self.policy, self.ready, self.start = policy, ready, start
        self.now = self.queue = 0.0
        self.coming: list[float] = []
        self.decisions: list[Decision] = []

    def second(self, arrives: float) -> Decision:
        self.now += 1
        self.ready += sum(at <= self.now for at in self.coming)
        self.coming = [at for at in self.coming if at > self.now]
        done = min(self.queue + arrives, self.ready * SPEED)
        self.queue += arrives - done
        full = self.ready > 0 and done >= 0.95 * self.ready * SPEED
        by_slots = (done + self.queue) / SPEED
        look = Look(self.now, arrives, self.queue, 0.0, done, self.ready, len(self.coming), full, by_slots)
        decision = self.policy.decide(look)
        self.decisions.append(decision)
        more = decision.replicas - self.ready - len(self.coming)
        if more > 0:
            self.coming += [self.now + self.start] * more
        elif more < 0:
            self.ready += more
        return decision

    def seconds(self, count: int, arrives: float) -> list[int]:
        return [self.second(arrives).replicas for _ in range(count)]


def downs(targets: list[int]) -> int:
    """Count the times that the number went down after it had gone up."""
    steps = [b - a for a, b in itertools.pairwise(targets) if a != b]
    return sum(before > 0 > after for before, after in itertools.pairwise([1, *steps]))


def test_a_step_is_answered_within_two_seconds() -> None:
    world = World(WorkPolicy(Bounds(1, 50)))
    world.seconds(60, 100)
    assert max(world.seconds(2, 16 * SPEED)) >= 16
    assert world.seconds(60, 16 * SPEED)[-1] <= math.ceil(16 / 0.8) + 1
    assert world.queue == 0


def test_a_steady_load_is_left_alone() -> None:
    world = World(WorkPolicy(Bounds(1, 50)))
    world.seconds(120, 4 * SPEED)
    assert len(set(world.seconds(600, 4 * SPEED))) == 1


@pytest.mark.parametrize("half", [5, 15, 40, 100])
def test_a_square_wave_does_not_flap(half: int) -> None:
    world, targets = World(WorkPolicy(Bounds(1, 50)), start=5), []
    for _ in range(12):
        targets += world.seconds(half, 10 * SPEED) + world.seconds(half, 0)
    last_periods = 4
    allowed = last_periods if half > 2 * 30 else 0  # a pause of more than two holds is no wave
    assert downs(targets[-last_periods * 2 * half :]) <= allowed


def test_it_comes_down_when_it_stays_quiet_and_forgets_the_wave() -> None:
    policy = WorkPolicy(Bounds(1, 50))
    world = World(policy)
    for _ in range(4):
        world.seconds(40, 10 * SPEED)
        world.seconds(40, 0)
    assert policy.steps.hold_s > 30
    assert world.seconds(1000, 0)[-1] == 1
    for _ in range(12):
        world.seconds(60, 10 * SPEED)
        world.seconds(3000, 0)
    assert policy.steps.hold_s == 30


def test_zero_and_back() -> None:
    world = World(WorkPolicy(Bounds(0, 5)), start=3)
    world.seconds(20, 100)
    assert world.seconds(60, 0)[-1] == 0
    assert world.second(1).replicas == 1
    assert world.queue == 1
    world.seconds(6, 0)
    assert world.queue == 0


def test_a_first_request_at_zero_is_answered_with_no_speed_known() -> None:
    world = World(WorkPolicy(Bounds(0, 5)), ready=0, start=2)
    assert world.seconds(5, 0)[-1] == 0
    decision = world.second(1)
    assert decision.replicas == 1
    assert "not known" in decision.reason


def test_bounds_hold_and_are_named() -> None:
    world = World(WorkPolicy(Bounds(2, 4)))
    assert world.seconds(5, 0) == [2] * 5
    world.seconds(3, 100 * SPEED)
    assert world.decisions[-1].replicas == 4
    assert any("4 is the most" in decision.reason for decision in world.decisions)


def test_reasons_tell_the_figures() -> None:
    world = World(WorkPolicy(Bounds(1, 50)))
    world.seconds(30, 2 * SPEED)
    world.second(20 * SPEED)
    reason = world.decisions[-1].reason
    assert reason.startswith("up: ")
    assert "a replica does" in reason


def test_speed_is_learned_from_busy_replicas_and_kept_while_they_are_not() -> None:
    policy = WorkPolicy(Bounds(1, 1))
    world = World(policy)
    world.seconds(30, 3 * SPEED)
    assert policy.speed == pytest.approx(SPEED, rel=0.05)
    world.queue = 0
    world.seconds(100, 10)
    assert policy.speed == pytest.approx(SPEED, rel=0.05)
