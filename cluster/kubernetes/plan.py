"""A deployment, and the jobs and endpoints in it → how many pods, and how long they may take to end. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal

from cluster.kubernetes import syntax
from cluster.kubernetes.spec import DeploymentSpec
from cluster.work import Group, JobWork, ServiceWork

MARGIN_S = 30
"""What a pod has beyond the time that its work needs to end: Ray's own processes end in it."""


@dataclass(frozen=True)
class Size:
    """How many worker pods a cluster has."""

    least: int
    most: int


def in_a_pod(spec: DeploymentSpec, group: Group) -> int:
    """Return how many of a group's processes fit into one worker pod."""
    rooms = [
        math.floor(offered / needed + 1e-9)
        for needed, offered in ((group.cpus, spec.workers.cpus), (group.gpus, spec.workers.gpus))
        if needed > 0
    ]
    return min(rooms, default=group.count)


def pods_for(spec: DeploymentSpec, groups: Iterable[Group]) -> int:
    """Return how many worker pods hold all of the groups: each process on one of them, the largest ones first."""
    room: list[list[float]] = []
    for group in sorted(groups, key=lambda g: (-g.gpus, -g.cpus)):
        for _ in range(group.count):
            if group.cpus <= 0 and group.gpus <= 0:
                continue
            free = next((r for r in room if r[0] + 1e-9 >= group.cpus and r[1] + 1e-9 >= group.gpus), None)
            if free is None:
                free = [float(spec.workers.cpus), float(spec.workers.gpus)]
                room.append(free)
            free[0] -= group.cpus
            free[1] -= group.gpus
    return len(room)


def size(spec: DeploymentSpec, groups: Iterable[Group]) -> Size:
    """Return the bounds of the worker group: what the work needs to begin with is there from the start.

    A job looks once whether it fits, and a cluster that is still to grow would be one in which it does not.
    """
    least = max(spec.workers.min, pods_for(spec, groups))
    return Size(least, max(least, spec.workers.max))


def needed_s(spec: DeploymentSpec, job: JobWork | None, service: ServiceWork | None) -> int:
    """Return how long a pod's work may take to end: a checkpoint, or the streams of an endpoint."""
    if service is not None:
        return math.ceil(service.drain_s)
    return spec.checkpoint_s


def grace_s(spec: DeploymentSpec, job: JobWork | None, service: ServiceWork | None) -> int:
    """Return the pods' terminationGracePeriodSeconds."""
    return spec.grace_s or needed_s(spec, job, service) + MARGIN_S


def pods_that_stay(spec: DeploymentSpec, least: int) -> int:
    """Return minAvailable of the workers' budget."""
    if spec.disruption.workers is not None:
        return spec.disruption.workers
    return least - 1 if least > 1 else least


def object_store(shm: str) -> int:
    """Return how many bytes of /dev/shm Ray's object store has; the rest is for data loaders and collectives."""
    return int(syntax.quantity(shm) * Decimal("0.75"))
