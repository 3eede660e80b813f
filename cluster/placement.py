"""Decide whether a group of equal workers fits on the cluster, where, and if not, what would help.

Pure arithmetic over `topology.Node`; Ray itself would wait silently for what can never fit.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from cluster.topology import Node

RESOLUTION = 1e-4
"""Ray counts resources in steps of 1/10,000; sums of fractions are off by less."""


@dataclass(frozen=True)
class Request:
    """A group of workers that must all run at once."""

    workers: int
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0

    def __str__(self) -> str:
        gpus = f" and {amount(self.gpus_per_worker, 'GPU')}" if self.gpus_per_worker else ""
        return f"{amount(self.workers, 'worker')} with {amount(self.cpus_per_worker, 'CPU')}{gpus} each"


@dataclass(frozen=True)
class Placement:
    """How many workers each node takes, by node id; nodes that take none are left out."""

    workers_by_node: dict[str, int]


@dataclass(frozen=True)
class Refusal:
    """Why a request does not fit now."""

    reason: str
    what_would_help: str
    fits_when_free: bool
    """Whether it fits once running work has ended: worth waiting for."""

    def __str__(self) -> str:
        return f"{self.reason}: {self.what_would_help}"


def capacity(request: Request, nodes: Iterable[Node]) -> int:
    """Return how many workers of this kind the living nodes could take if nothing else ran on them."""
    return sum(_room(request, node.total_cpus, node.total_gpus) for node in nodes if node.alive)


def fit_most(request: Request, fewest: int, nodes: Iterable[Node], grown: Iterable[Node] = ()) -> Placement | Refusal:
    """Place as many workers as are free now, `request.workers` at most; fewer than `fewest` are refused; see `fit`."""
    alive = [node for node in nodes if node.alive]
    free = sum(_room(request, node.free_cpus, node.free_gpus) for node in alive)
    return fit(replace(request, workers=max(fewest, min(request.workers, free))), alive, grown)


def fit(request: Request, nodes: Iterable[Node], grown: Iterable[Node] = ()) -> Placement | Refusal:
    """Place the workers on as few nodes as possible by what is free, or say why that cannot be.

    `grown`: the nodes of a cluster that can grow, at its full size (cluster/growth.py).

    A worker never spans nodes. Raises ValueError for a request of no workers or of negative amounts.
    """
    if request.workers < 1 or min(request.cpus_per_worker, request.gpus_per_worker) < 0:
        raise ValueError(f"not a request for workers: {request}")
    alive = [node for node in nodes if node.alive]
    free = {node.node_id: _room(request, node.free_cpus, node.free_gpus) for node in alive}
    if sum(free.values()) >= request.workers:
        return Placement(_fill(request.workers, free))
    at_best = capacity(request, alive)
    if at_best >= request.workers:
        return _refuse_for_now(request, alive, sum(free.values()))
    if capacity(request, grown) >= request.workers:
        return _refuse_until_grown(request, alive)
    return _refuse(request, alive, at_best)


def _room(request: Request, cpus: float, gpus: float) -> int:
    """Count the workers for which these CPUs and GPUs are enough."""
    rooms = [
        math.floor((available + RESOLUTION) / needed)
        for needed, available in ((request.cpus_per_worker, cpus), (request.gpus_per_worker, gpus))
        if needed > 0
    ]
    return min(rooms, default=request.workers)


def _fill(workers: int, room_by_node: dict[str, int]) -> dict[str, int]:
    """Fill the roomiest nodes first: fewer nodes, less traffic between them."""
    placed = {}
    for node_id, room in sorted(room_by_node.items(), key=lambda item: -item[1]):
        if taken := min(room, workers):
            placed[node_id] = taken
            workers -= taken
    return placed


def _refuse_for_now(request: Request, alive: Sequence[Node], room: int) -> Refusal:
    cpus, gpus = sum(node.free_cpus for node in alive), sum(node.free_gpus for node in alive)
    now = f", or ask for {amount(room, 'worker')}" if room else ""
    return Refusal(
        reason=f"{request} do not fit now, {_offer(cpus, gpus)} free",
        what_would_help=f"wait until other work ends{now}",
        fits_when_free=True,
    )


def _refuse_until_grown(request: Request, alive: Sequence[Node]) -> Refusal:
    cpus, gpus = sum(node.total_cpus for node in alive), sum(node.total_gpus for node in alive)
    return Refusal(
        reason=f"{request} do not fit yet, the cluster has {_offer(cpus, gpus)} on {amount(len(alive), 'node')}",
        what_would_help="its autoscaler is asked for more nodes",
        fits_when_free=True,
    )


def _refuse(request: Request, alive: Sequence[Node], room: int) -> Refusal:
    cpus, gpus = sum(node.total_cpus for node in alive), sum(node.total_gpus for node in alive)
    reason = f"{request} can never fit: the cluster has {_offer(cpus, gpus)} on {amount(len(alive), 'node')}"
    return Refusal(reason, _remedy(request, alive, room), fits_when_free=False)


def _remedy(request: Request, alive: Sequence[Node], room: int) -> str:
    if room:
        return f"ask for at most {amount(room, 'worker')} of that size, for smaller ones, or add nodes"
    if request.gpus_per_worker and not any(node.total_gpus for node in alive):
        return "set gpus_per_worker to 0, or add nodes with GPUs"
    if not alive:
        return "start nodes"
    largest = max(alive, key=lambda node: (node.total_gpus * bool(request.gpus_per_worker), node.total_cpus))
    offer = _offer(largest.total_cpus, largest.total_gpus)
    return f"a worker runs on one node, and the largest has {offer}; ask for less per worker"


def _offer(cpus: float, gpus: float) -> str:
    return f"{amount(cpus, 'CPU')} and {amount(gpus, 'GPU')}"


def amount(number: float, what: str) -> str:
    """Say `number` of `what`, in the singular or the plural."""
    return f"{number:g} {what}{'' if number == 1 else 's'}"
