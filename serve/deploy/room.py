"""Whether the cluster has room for the replicas that a spec asks for: what is asked, what is free, and the way out.

Ray waits silently for what never fits. Pure, over the nodes and what Serve's REST API tells of replicas.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cluster.placement import Refusal, Request, amount, capacity, fit
from cluster.topology import Node


def never(
    name: str, replicas: int, cpus: float, gpus: float, nodes: Sequence[Node], grown: Sequence[Node] = ()
) -> str | None:
    """Say why so many replicas can never run here, even if nothing else did; None: they can.

    Args:
        name: the key of what they are replicas of, such as `models.chat`.
        grown: the nodes of a cluster that can grow, at its full size (cluster/growth.py).
    """
    alive = [node for node in nodes if node.alive]
    request = Request(replicas, cpus, gpus)
    at_best = capacity(request, alive)
    if at_best >= replicas or capacity(request, grown) >= replicas:
        return None
    asked = _asked(replicas, cpus, gpus)
    has = _offer([(node.total_cpus, node.total_gpus) for node in alive])
    return f"{name}: {asked} can never fit: the cluster has {has}: {_way_out(at_best, gpus, alive)}"


def lacking(applications: Mapping[str, Any], nodes: Sequence[Node]) -> dict[str, str]:
    """Return, by application, why replicas that wait for a node get none now.

    Args:
        applications: of Serve's REST API. A replica without a `node_id` has not been placed; one that could be placed
            on what is free is on its way, and left out.
    """
    said = {}
    for name, application in applications.items():
        for deployment in application["deployments"].values():
            waiting = sum(r["state"] == "STARTING" and not r.get("node_id") for r in deployment["replicas"])
            if sentence := waiting and _no_room(waiting, *_per_replica(deployment), nodes):
                said[name] = sentence
    return said


def fits_now(replicas: int, cpus: float, gpus: float, nodes: Sequence[Node]) -> bool:
    """Tell whether so many replicas fit on what is free, each of them on one node."""
    return not isinstance(fit(Request(replicas, cpus, gpus), nodes), Refusal)


def _no_room(replicas: int, cpus: float, gpus: float, nodes: Sequence[Node]) -> str | None:
    refusal = fit(Request(replicas, cpus, gpus), nodes)
    if not isinstance(refusal, Refusal):
        return None
    alive = [node for node in nodes if node.alive]
    free = _offer([(node.free_cpus, node.free_gpus) for node in alive])
    waits = f"no room for {_asked(replicas, cpus, gpus)}, {free} free"
    if refusal.fits_when_free:
        return f"{waits}: stop what else runs (`tandem jobs list`), ask for less under `resources`, or add nodes"
    return f"{waits}: {_way_out(capacity(Request(replicas, cpus, gpus), alive), gpus, alive)}"


def _per_replica(deployment: Mapping[str, Any]) -> tuple[float, float]:
    """Return the CPUs and GPUs that Ray reserves for a replica; Serve's own default is one CPU."""
    options = deployment["deployment_config"].get("ray_actor_options") or {}
    cpus, gpus = options.get("num_cpus"), options.get("num_gpus")
    return (1.0 if cpus is None else float(cpus)), float(gpus or 0)


def _way_out(at_best: int, gpus: float, alive: Sequence[Node]) -> str:
    if at_best:
        return f"ask for at most {amount(at_best, 'replica')} of that size, for smaller ones, or add nodes"
    if gpus and not any(node.total_gpus for node in alive):
        return "set resources.gpus_per_replica to 0, or add nodes with GPUs"
    if not alive:
        return "start nodes"
    largest = max(alive, key=lambda node: (node.total_gpus * bool(gpus), node.total_cpus))
    offer = _offer([(largest.total_cpus, largest.total_gpus)])
    return f"a replica runs on one node, and the largest has {offer}; ask for less under `resources`, or add nodes"


def _asked(replicas: int, cpus: float, gpus: float) -> str:
    more = f" and {amount(gpus, 'GPU')}" if gpus else ""
    return f"{amount(replicas, 'replica')} with {amount(cpus, 'CPU')}{more}{' each' if replicas > 1 else ''}"


def _offer(parts: Iterable[tuple[float, float]]) -> str:
    cpus, gpus = (sum(each) for each in zip(*parts, strict=True)) if (parts := list(parts)) else (0.0, 0.0)
    return f"{amount(cpus, 'CPU')} and {amount(gpus, 'GPU')}"
