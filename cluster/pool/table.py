"""What jobs and endpoints tell the pool, what it grants them, and the rules it goes by: plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

FRESH_S = 15.0
"""Who has told nothing for longer is gone: a job's driver and an endpoint's scaling tell once a second."""


@dataclass(frozen=True)
class JobReport:
    """A training job, as its driver tells it."""

    key: str
    """Its submission id."""
    name: str
    project: str
    """Whose share of the cluster it counts against: a project, or else a user."""
    priority: int
    """Higher goes first."""
    fewest: int
    most: int
    """Workers that it can run with; both are the same where it is not elastic."""
    cpus: float
    gpus: float
    """Of each worker."""
    asked_at: float
    """When it asked for room first, in seconds since the epoch."""
    preemptible: bool = False
    """It may be asked to save and step back altogether."""
    multiple: int = 1
    """Workers come in whole multiples of it."""
    workers_by_node: Mapping[str, int] = field(default_factory=dict)
    """Node id → workers that run there now; empty while it waits, prepares, or starts."""
    ends_in_s: float | None = None
    """By its own steps so far, and at the workers that it has; None: not known."""


@dataclass(frozen=True)
class EndpointReport:
    """One model of an endpoint, or its gateway, as its scaling tells it."""

    key: str
    """Endpoint/model."""
    wanted: int
    """Replicas that it needs now, by its own scaling."""
    fewest: int
    """It never has fewer: what its spec says."""
    cpus: float
    gpus: float
    """Of each replica."""
    priority: int = 0
    replicas_by_node: Mapping[str, int] = field(default_factory=dict)
    """Node id → replicas that are placed there; those that wait for room are in none."""


@dataclass(frozen=True)
class Rules:
    """What whoever cares for the cluster has set: `tandem cluster arbiter --set`."""

    enabled: bool = True
    """Off: jobs wait in order, and no running one is asked to give anything up."""
    serving_floor: float = 0.0
    """This share of the cluster's CPUs and of its GPUs is left to serving: training never grows into it."""
    serving_quota: float = 1.0
    """Serving has training give up room only as long as it has less than this share of the cluster."""
    training_floor: float = 0.0
    """Training keeps this share of the cluster, if it can use it, whatever serving needs."""
    hold_s: float = 30.0
    """What was given up for serving is given back when serving has not needed it for so long."""
    shares: Mapping[str, float] = field(default_factory=dict)
    """Project → weight of its fair share; one that is not named has 1."""


@dataclass(frozen=True)
class Grant:
    """What a job may have now."""

    workers: int
    """0: it waits, or saves and steps back; otherwise `fewest` to `most`."""
    reason: str
    """A sentence for people: why so many, and of one that waits, for what."""
    starts_in_s: float | None = None
    """Of one that waits: when it may start, as far as running jobs tell when they end; None: not known."""
