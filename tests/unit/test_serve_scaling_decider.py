"""From reports to numbers of replicas: gateways that begin anew, reports that stop, updates, zero, and who set what."""

from __future__ import annotations

import math
from typing import Any

import pytest

from serve.scaling.decider import Decider, Plan
from serve.scaling.decisions import GATEWAY_ROW, Change, Standing, as_json, scaling_samples, sentence
from serve.scaling.steps import Bounds
from serve.wire import GatewayState, Load, ReplicaState, Work

LOOK_S = 0.5
SLOTS = 4
SPEED = 100.0
"""Tokens a second of a replica with all slots in use."""


def plan(least: int = 1, most: int = 5, version: str = "1", **bounds: float) -> Plan:
    return Plan(Bounds(least, most, **{"hold_s": 5.0, **bounds}), version, slots=SLOTS)


def gateway(arrived: float, done: float, waiting: float = 0, running: float = 0, pending: int = 0) -> GatewayState:
    return GatewayState({"m": pending}, {"m": Work(arrived, done, waiting, running)})


def replica(running: int = 0, leaving: bool = False) -> ReplicaState:
    return ReplicaState("m", "r", "1", Load(running, 0, 0.0), {}, leaving=leaving)


class Endpoint:
    """One gateway, and replicas that work off `SPEED` tokens a second; requests have 10 tokens."""

    def __init__(self, decider: Decider, ready: int) -> None:
        self.decider, self.ready = decider, ready
        self.now = self.arrived = self.done = self.left = 0.0
        self.changes: list[Change] = []

    def look(self, per_s: float = 0.0, ready: int | None = None) -> int:
        self.ready = self.ready if ready is None else ready
        self.now += LOOK_S
        self.arrived += per_s * LOOK_S
        self.left += per_s * LOOK_S
        did = min(self.left, self.ready * SPEED * LOOK_S)
        self.left -= did
        self.done += did
        waiting = max(0.0, self.left - self.ready * SLOTS * 10)
        used = math.ceil(SLOTS * did / (self.ready * SPEED * LOOK_S)) if self.ready else 0
        told: dict[str, Any] = {f"r{at}": replica(used) for at in range(self.ready)}
        told["g"] = gateway(self.arrived, self.done, waiting, self.left - waiting, int(waiting / 10))
        self.changes += self.decider.look(self.now, self.now, told).values()
        return self.decider.state().standings["m"].wanted


def decider(there: int = 1, **bounds: Any) -> Decider:
    made = Decider()
    made.know({"m": plan(**bounds)}, {"m": there})
    return made


def test_a_step_is_answered_within_seconds_and_quiet_takes_it_back() -> None:
    endpoint = Endpoint(decider(), 1)
    for _ in range(20):
        assert endpoint.look(20) == 1
    assert max(endpoint.look(250) for _ in range(6)) >= 2
    for _ in range(60):
        endpoint.look(250, ready=3)
    assert endpoint.look(0) >= 3
    quiet = [endpoint.look(0, ready=1) for _ in range(60)]
    assert quiet[2] >= 3
    assert quiet[-1] == 1
    assert [change.kind for change in endpoint.changes][-1] == "quiet"
    assert endpoint.changes[0].kind in ("slots", "rate", "backlog")


def test_a_lone_user_who_never_pauses_gets_no_second_replica() -> None:
    made = decider()
    for at in range(200):
        told = {"g": gateway(10.0 * at, 10.0 * at, running=10), "r": replica(1)}
        assert made.look(at * LOOK_S, 0.0, told) == {}


def test_a_square_wave_does_not_flap() -> None:
    endpoint = Endpoint(decider(), 1)
    for _ in range(12):
        for _ in range(16):
            endpoint.look(250, ready=4)
        for _ in range(16):
            endpoint.look(0, ready=4)
    before = len(endpoint.changes)
    for _ in range(4):
        for _ in range(16):
            endpoint.look(250, ready=4)
        for _ in range(16):
            endpoint.look(0, ready=4)
    assert len(endpoint.changes) == before


def test_zero_and_the_first_request_at_once() -> None:
    made = decider(least=0, up_after_s=3.0)
    for at in range(20):
        made.look(at * LOOK_S, 0.0, {"g": gateway(0, 0), "r": replica()})
    assert made.wanted() == {"m": 0}
    made.applied("m", 0)
    assert not made.asleep(gateway(0, 0))
    assert made.asleep(gateway(9, 0, waiting=9, pending=1))
    changes = made.look(10.5, 0.0, {"g": gateway(9, 0, waiting=9, pending=1)})
    assert (changes["m"].after, changes["m"].kind) == (1, "wake")
    assert not made.asleep(gateway(9, 0, waiting=9, pending=1))


def test_more_must_be_needed_for_a_while_where_the_spec_says_so() -> None:
    made, at = decider(up_after_s=2.0), 0.0
    busy = {"g": gateway(0, 0, waiting=500, running=40, pending=40), "r": replica(SLOTS)}
    calm = {"g": gateway(0, 0), "r": replica()}
    for told, looks, wanted in ((calm, 5, 1), (busy, 3, 1), (calm, 1, 1), (busy, 4, 1), (busy, 2, 2)):
        for _ in range(looks):
            at += LOOK_S
            made.look(at, 0.0, told)
        assert made.state().standings["m"].wanted == wanted


def test_a_gateway_that_begins_anew_brings_no_work_and_takes_none() -> None:
    made = decider()
    made.look(0.0, 0.0, {"g": gateway(1e9, 1e9), "r": replica()})
    for at in range(1, 20):
        made.look(at * LOOK_S, 0.0, {"g": gateway(1e9 + at, 1e9 + at), "r": replica()})
    for at in range(20, 40):
        assert made.look(at * LOOK_S, 0.0, {"g": gateway(at - 19, at - 19), "r": replica()}) == {}
        assert made.look(at * LOOK_S + 0.1, 0.0, {"new": gateway(5e6, 5e6), "r": replica()}) == {}


def test_what_was_expected_and_did_not_come_is_taken_back() -> None:
    made = decider(there=2)
    busy = [replica(SLOTS), replica(SLOTS)]
    told = {"a": busy[0], "b": busy[1]}
    for at in range(20):
        made.look(at * LOOK_S, 0.0, told | {"g": gateway(100.0 * at, 100.0 * at)})
    made.look(10.5, 0.0, told | {"g": gateway(2000 + 50_000, 2000)})
    made.look(10.6, 0.0, told | {"g": gateway(2000, 2001)})  # 50,000 tokens that nobody generated
    reason = made.state().standings["m"].reason
    assert int(reason.split(" tokens/s arrive")[0].rsplit(" ", 1)[1].replace(",", "")) < 3000, reason


def test_without_a_gateway_nothing_is_known_and_nothing_is_done() -> None:
    made = decider(there=3)
    for at in range(100):
        assert made.look(at * LOOK_S, 0.0, {"r": replica()}) == {}
    assert made.wanted() == {}


def test_a_decider_that_begins_goes_on_from_what_there_is() -> None:
    made = decider(there=4)
    told = {"g": gateway(0, 0), "r": replica()}
    assert made.look(0.0, 0.0, told) == {}
    assert made.look(4.0, 0.0, told) == {}
    assert made.look(6.0, 0.0, told)["m"].after == 1


def test_a_number_that_somebody_else_has_set_holds_as_if_it_was_needed() -> None:
    made = decider(there=1)
    told = {"g": gateway(0, 0), "r": replica()}
    made.look(0.0, 0.0, told)
    made.know({"m": plan()}, {"m": 3})
    assert made.wanted() == {}
    assert made.look(10.0, 0.0, told) == {}
    assert made.look(16.0, 0.0, told)["m"].after == 1


def test_new_bounds_act_at_the_next_look_and_say_so() -> None:
    made = decider(there=2)
    told = {"g": gateway(0, 0), "r": replica()}
    made.look(0.0, 0.0, told)
    made.know({"m": plan(3, 5)}, {"m": 2})
    up = made.look(0.5, 0.0, told)["m"]
    assert (up.after, up.kind) == (3, "bounds")
    made.know({"m": plan(1, 2)}, {"m": 3})
    down = made.look(1.0, 0.0, told)["m"]
    assert (down.after, down.kind) == (2, "bounds")


def test_speed_is_known_again_when_a_version_comes_back() -> None:
    endpoint = Endpoint(decider(most=1), 1)
    for _ in range(40):
        endpoint.look(3 * SPEED)
    made = endpoint.decider
    assert made.state().standings["m"].speed == pytest.approx(SPEED, rel=0.05)
    made.know({"m": plan(most=1, version="2")}, {"m": 1})
    assert made.state().standings["m"].speed is None
    made.know({"m": plan(most=1)}, {"m": 1})
    assert made.state().standings["m"].speed == pytest.approx(SPEED, rel=0.05)


def test_another_decider_goes_on_from_what_this_one_has_learned() -> None:
    endpoint = Endpoint(decider(), ready=1)
    while endpoint.look(per_s=2.5 * SPEED) < 3:
        pass
    before = endpoint.decider.state().standings["m"]
    after = Decider()
    after.recall(endpoint.decider.memory())
    after.know({"m": plan()}, {"m": 3})
    told = after.state().standings["m"]
    assert before.speed
    assert (told.speed, told.changes, told.ups) == (before.speed, before.changes, before.ups)
    assert told.wanted == 3
    again = Decider()
    again.recall(after.memory())
    assert again.memory() == after.memory(), "what nobody has asked for yet is not forgotten"


def test_replicas_that_leave_are_not_counted_as_ready() -> None:
    made = decider(there=1)
    told = {"g": gateway(0, 0, waiting=1, running=40, pending=1), "a": replica(SLOTS, leaving=True), "b": replica(1)}
    for at in range(10):
        made.look(at * LOOK_S, 0.0, told)
    assert made.state().standings["m"].speed is None


def test_gateways_scale_by_their_open_requests() -> None:
    made = Decider()
    row = {GATEWAY_ROW: Plan(Bounds(1, 4, hold_s=5.0), "", requests=64)}
    made.know(row, {GATEWAY_ROW: 1})

    def told(count: int) -> dict[str, Any]:
        return {"a": GatewayState({}, open_requests=count), "b": GatewayState({}, open_requests=10)}

    assert made.look(0.0, 0.0, told(54)) == {}
    change = made.look(0.5, 0.0, told(140))[GATEWAY_ROW]
    assert (change.after, change.kind) == (3, "requests")
    assert "150 open requests, 64 a replica" in change.reason
    assert made.look(2.0, 0.0, told(0)) == {}
    assert made.look(7.0, 0.0, told(0))[GATEWAY_ROW].after == 1


def test_a_plan_survives_the_gateways_configuration() -> None:
    for given in (plan(0, 7, catch_up_s=2.0), Plan(Bounds(1, 2), "", requests=12.5)):
        assert Plan.read(given.as_config()) == given


def test_what_was_decided_is_told() -> None:
    change = Change(1.0, 1, 2, "rate", "up: 812 tokens/s arrive")
    standing = Standing(2, "stays: x", 1, 0, (change,), 500.04)
    told = as_json(standing)
    assert told["changes"] == [{"at": 1.0, "before": 1, "after": 2, "kind": "rate", "reason": change.reason}]
    assert sentence(told) == "2 replicas wanted: up: 812 tokens/s arrive"
    assert (
        sentence(as_json(Standing(1, "stays: y", 0, 0, (), None, "gone")))
        == "1 replica wanted: stays: y; not set yet: gone"
    )
    samples = {(name, *labels.values()): value for name, labels, value in scaling_samples({"m": standing})}
    assert samples == {
        ("tandem_scaling_replicas_wanted", "m"): 2,
        ("tandem_scaling_decisions_total", "m", "up"): 1,
        ("tandem_scaling_decisions_total", "m", "down"): 0,
        ("tandem_scaling_last_decision_info", "m", "rate"): 1,
    }
