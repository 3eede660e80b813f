"""All models and the gateway of one endpoint: from what gateways and replicas tell to numbers of replicas.

Pure: the reports and the time are arguments. What is remembered: what each gateway told last, since it tells sums; the
policies; speeds by model and version, so that a model that comes back is known; and the last changes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from serve.scaling.decisions import KEPT, Change, ScalingState, Standing
from serve.scaling.policy import Look, WorkPolicy
from serve.scaling.requests import RequestPolicy
from serve.scaling.steps import Bounds, Decision
from serve.wire import GatewayState, ReplicaState, Work

NO_WORK = Work(0.0, 0.0, 0.0, 0.0)
FULL = 0.95
"""Share of the slots that counts as all: between two requests a slot is free for a moment."""


class Plan(NamedTuple):
    """How one model, or the gateway, may scale."""

    bounds: Bounds
    version: str
    """Changes with whatever changes a replica's speed."""
    slots: int = 1
    """Sequences that one replica works on at the same time."""
    requests: float | None = None
    """Open requests of one replica, for the gateway."""

    @classmethod
    def read(cls, told: Mapping[str, Any]) -> Plan:
        """Return the plan that `as_config` wrote."""
        return cls(Bounds(**told["bounds"]), told["version"], told["slots"], told["requests"])

    def as_config(self) -> dict[str, Any]:
        """Return it as JSON for the gateway's configuration, where it outlives whoever decides."""
        return {**self._asdict(), "bounds": self.bounds.__dict__}


class Reports(NamedTuple):
    """Fresh reports."""

    gateways: dict[str, GatewayState]
    """By sender."""
    replicas: dict[str, list[ReplicaState]]
    """By model."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Reports:
        """Sort reports by what tells them."""
        gateways: dict[str, GatewayState] = {}
        replicas: dict[str, list[ReplicaState]] = {}
        for sender, value in values.items():
            if isinstance(value, ReplicaState):
                replicas.setdefault(value.model, []).append(value)
            elif isinstance(value, GatewayState):
                gateways[sender] = value
        return cls(gateways, replicas)


@dataclass
class _Scaled:
    plan: Plan
    policy: WorkPolicy | RequestPolicy
    there: int
    """Replicas that Serve was last known to aim at."""
    reason: str = "nothing was looked at yet"
    refused: str = ""
    ups: int = 0
    downs: int = 0
    changes: deque[Change] = field(default_factory=lambda: deque(maxlen=KEPT))


class Decider:
    """Decides for one endpoint."""

    def __init__(self) -> None:
        self._scaled: dict[str, _Scaled] = {}
        self._speeds: dict[tuple[str, str], float] = {}
        self._told: dict[str, dict[str, Work]] = {}
        """What each gateway told last of each model."""
        self._recalled: dict[str, dict[str, Any]] = {}
        """By name, what another decider had decided before; taken up when it is known what may scale."""

    # -- what there is ---------------------------------------------------------------------------------------------

    def know(self, plans: Mapping[str, Plan], there: Mapping[str, int]) -> None:
        """Take what may scale, and how many replicas Serve aims at; what is not named any more is forgotten."""
        for gone in set(self._scaled) - set(plans):
            del self._scaled[gone]
        for name, plan in plans.items():
            known = self._scaled.get(name)
            if known is None or known.plan.version != plan.version:
                self._scaled[name] = self._begun(name, plan, there[name], known)
                continue
            known.plan = plan
            known.policy.steps.allow(plan.bounds)
            if isinstance(known.policy, RequestPolicy) and plan.requests:
                known.policy.each = plan.requests
            if there[name] not in (known.there, known.policy.steps.target):  # somebody else has set it
                known.policy.steps.restart(there[name])
            self.applied(name, there[name])

    def applied(self, name: str, count: int, refused: str = "") -> None:
        """Take note of the number that Serve aims at, or of why it does not aim at the one decided."""
        scaled = self._scaled[name]
        scaled.there = scaled.there if refused else count
        if refused or count == scaled.policy.steps.target:
            scaled.refused = refused

    def wanted(self) -> dict[str, int]:
        """Return the numbers that Serve does not aim at yet."""
        targets = {name: scaled.policy.steps.target for name, scaled in self._scaled.items()}
        return {name: target for name, target in targets.items() if target != self._scaled[name].there}

    def asleep(self, report: GatewayState) -> bool:
        """Tell whether a gateway has work for a model that has no replicas."""
        sleeping = (name for name, scaled in self._scaled.items() if scaled.policy.steps.target == 0)
        return any((work := report.work.get(name)) and work.waiting + work.running > 0 for name in sleeping)

    def state(self) -> ScalingState:
        """Return what is told of it."""
        return ScalingState({name: _standing(scaled) for name, scaled in self._scaled.items()})

    def memory(self) -> dict[str, Any]:
        """Return what was learned and decided, as plain data."""
        told = {
            name: {"ups": each.ups, "downs": each.downs, "changes": [tuple(change) for change in each.changes]}
            for name, each in self._scaled.items()
        }
        return {"speeds": [(*place, speed) for place, speed in self._speeds.items()], "told": self._recalled | told}

    def recall(self, memory: Mapping[str, Any]) -> None:
        """Go on from what another decider had learned; before `know`."""
        self._speeds.update({(name, version): speed for name, version, speed in memory["speeds"]})
        self._recalled = dict(memory["told"])

    # -- looks -----------------------------------------------------------------------------------------------------

    def look(self, now: float, at: float, values: Mapping[str, Any]) -> dict[str, Change]:
        """Decide for everything that scales; returns what changed.

        Args:
            now: seconds of a steady clock.
            at: Unix time, for the record.
            values: the fresh reports, by sender. Without a gateway's nothing is known, and nothing is decided.
        """
        reports = Reports.of(values)
        if not reports.gateways:
            return {}
        work = self._since(reports.gateways)
        changes = {}
        for name, scaled in self._scaled.items():
            before = scaled.policy.steps.target
            decision = self._decide(now, name, scaled, reports, work)
            scaled.reason = decision.reason
            if decision.replicas != before:
                changes[name] = Change(at, before, decision.replicas, decision.kind, decision.reason)
                scaled.changes.append(changes[name])
                scaled.ups += decision.replicas > before
                scaled.downs += decision.replicas < before
        return changes

    def _decide(self, now: float, name: str, scaled: _Scaled, reports: Reports, work: Mapping[str, Work]) -> Decision:
        policy = scaled.policy
        if isinstance(policy, RequestPolicy):
            return policy.decide(now, sum(gateway.open_requests for gateway in reports.gateways.values()))
        decision = policy.decide(_looked(now, name, scaled, reports, work.get(name, NO_WORK)))
        if (speed := policy.busy_speed) is not None:
            self._speeds[name, scaled.plan.version] = speed
        return decision

    def _begun(self, name: str, plan: Plan, there: int, known: _Scaled | None) -> _Scaled:
        policy: WorkPolicy | RequestPolicy
        if plan.requests is not None:
            policy = RequestPolicy(plan.bounds, plan.requests, there)
        else:
            policy = WorkPolicy(plan.bounds, self._speeds.get((name, plan.version)), there)
        begun = _Scaled(plan, policy, there)
        if known is not None:
            begun.ups, begun.downs, begun.changes = known.ups, known.downs, known.changes
        elif (told := self._recalled.pop(name, None)) is not None:
            begun.ups, begun.downs = told["ups"], told["downs"]
            begun.changes.extend(Change(*change) for change in told["changes"])
        return begun

    def _since(self, gateways: Mapping[str, GatewayState]) -> dict[str, Work]:
        """Return by model what came and was done since the last look, and what waits and runs now."""
        told, self._told = self._told, {sender: gateway.work for sender, gateway in gateways.items()}
        sums: dict[str, Work] = {}
        for sender, gateway in gateways.items():
            for model, work in gateway.work.items():
                before = told[sender].get(model, NO_WORK) if sender in told else work
                sums[model] = _plus(sums.get(model, NO_WORK), _difference(before, work))
        return sums


def _difference(before: Work, now: Work) -> Work:
    """Return what came and was done in between.

    `done` never falls but where a gateway has begun anew: then all it tells is new. `arrived` may fall, by what was
    expected of requests that generated less.
    """
    if now.done < before.done:
        before = NO_WORK
    return Work(now.arrived - before.arrived, now.done - before.done, now.waiting, now.running)


def _plus(one: Work, other: Work) -> Work:
    return Work(
        one.arrived + other.arrived, one.done + other.done, one.waiting + other.waiting, one.running + other.running
    )


def _looked(now: float, name: str, scaled: _Scaled, reports: Reports, work: Work) -> Look:
    own = reports.replicas.get(name, [])
    staying = [replica for replica in own if not replica.leaving]
    ready, slots = len(staying), scaled.plan.slots
    inside = _inside(staying)
    requests = _inside(own) + sum(gateway.pending.get(name, 0) for gateway in reports.gateways.values())
    return Look(
        now,
        work.arrived,
        work.waiting,
        work.running,
        work.done,
        ready,
        max(0, scaled.there - ready),
        full=inside >= FULL * slots * ready > 0,
        by_slots=requests / slots,
    )


def _inside(replicas: Iterable[ReplicaState]) -> int:
    return sum(replica.load.running + replica.load.waiting for replica in replicas)


def _standing(scaled: _Scaled) -> Standing:
    policy = scaled.policy
    return Standing(
        policy.steps.target,
        scaled.reason,
        scaled.ups,
        scaled.downs,
        tuple(scaled.changes),
        policy.busy_speed if isinstance(policy, WorkPolicy) else None,
        scaled.refused,
    )
