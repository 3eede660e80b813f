"""What scaling has decided, as status and metrics tell it: plain data, and what is made of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from serve.scaling.steps import Kind

GATEWAY_ROW = "(gateway)"
"""Stands for the gateway beside names of models, which have no brackets."""
KEPT = 20
"""Changes of one model that are remembered."""


class Change(NamedTuple):
    """One change of a number of replicas."""

    at: float
    """Unix time, seconds."""
    before: int
    after: int
    kind: Kind
    reason: str


@dataclass(frozen=True)
class Standing:
    """Where the scaling of one model, or of the gateway, stands."""

    wanted: int
    reason: str
    """Of the last look: why so many."""
    ups: int
    downs: int
    changes: tuple[Change, ...]
    """The last ones, oldest first."""
    speed: float | None = None
    """Tokens a second of a replica whose slots were all in use."""
    refused: str = ""
    """Why the number could not be set yet; empty when it was."""


@dataclass(frozen=True)
class ScalingState:
    """What the state actor tells beside what gateways and replicas do."""

    standings: dict[str, Standing]
    """By model, and `GATEWAY_ROW`; without what has a fixed number."""


def as_json(standing: Standing) -> dict[str, Any]:
    """Return what /status tells of one model's scaling."""
    changes = [change._asdict() for change in standing.changes]
    return {
        "wanted": standing.wanted,
        "reason": standing.reason,
        "speed": None if standing.speed is None else round(standing.speed, 1),
        "refused": standing.refused,
        "changes": changes,
    }


def sentence(told: Mapping[str, Any]) -> str:
    """Say in one line how many replicas are wanted and why; `told`: as `as_json` returns it."""
    last = told["changes"][-1]["reason"] if told["changes"] else told["reason"]
    count = told["wanted"]
    refused = f"; not set yet: {told['refused']}" if told["refused"] else ""
    return f"{count} replica{'s' * (count != 1)} wanted: {last}{refused}"


def scaling_samples(standings: Mapping[str, Standing]) -> Iterator[tuple[str, dict[str, str], float]]:
    """Give the metrics of scaling: (name, labels, value). Reasons are kinds, so that series stay few."""
    for model, standing in standings.items():
        yield "tandem_scaling_replicas_wanted", {"model": model}, float(standing.wanted)
        for direction, count in (("up", standing.ups), ("down", standing.downs)):
            yield "tandem_scaling_decisions_total", {"model": model, "direction": direction}, float(count)
        if standing.changes:
            yield "tandem_scaling_last_decision_info", {"model": model, "reason": standing.changes[-1].kind}, 1.0
