"""Which nodes the cluster has, what they offer, and what of it is free right now."""

import socket
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from cluster import ray_internals
from cluster.connect import connection, explained, get_json, job_client
from cluster.rejoining import RETURNS_LABEL

ACCELERATOR_LABEL = "ray.io/accelerator-type"
MOST_NODES = 10_000
HEAD_RESOURCE = "node:__internal_head__"
"""The resource by which Ray names the head node."""

Used = dict[str, dict[str, float]]
"""Node id → resource → amount in use."""


@dataclass(frozen=True)
class Node:
    """One Ray node. Free amounts are what no task, actor or placement group has reserved."""

    node_id: str
    address: str
    alive: bool
    is_head: bool
    total_cpus: float
    free_cpus: float
    total_gpus: float = 0.0
    free_gpus: float = 0.0
    memory_bytes: int = 0
    accelerator_type: str | None = None
    labels: dict[str, str] = field(default_factory=dict)
    reason: str = ""
    """Why Ray took a dead node off, in its words."""
    ended_at: float = 0.0
    """When that was, in seconds since the epoch; 0: not known."""

    @property
    def returns(self) -> int:
        """How often the node has joined again after its death, where a supervisor keeps it (cluster/supervisor.py)."""
        told = self.labels.get(RETURNS_LABEL, "")
        return int(told) if told.isdecimal() else 0


def nodes() -> list[Node]:
    """List the cluster's nodes, the head first and dead ones last, as long as Ray remembers them.

    What is free comes from the GCS and is milliseconds old. Where RAY_ADDRESS reaches the Jobs API only, it is what the
    autoscaler saw last, up to 5 s ago. Raises UserError when the cluster does not answer.
    """
    from ray.util.state import list_nodes

    address = connection().ray_address
    with explained(address):
        listed = list_nodes(job_client().get_address(), detail=True, limit=MOST_NODES)
        used = _used_by_dashboard() if "://" in address else ray_internals.used_by_gcs(address)
    found = [_node(entry, used.get(entry.node_id, {})) for entry in listed]
    return _sorted(found)


def own_nodes() -> list[Node]:
    """List the same for a process that is connected to the cluster: without the dashboard, in milliseconds."""
    import ray

    used = ray_internals.used_by_gcs(ray.get_runtime_context().gcs_address)
    return _sorted([_told(entry, used.get(entry["NodeID"], {})) for entry in ray.nodes()])


def alive() -> set[str]:
    """Return the ids of the nodes that Ray takes to be alive; for a process that is connected to the cluster."""
    import ray

    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def name_of(node_id: str) -> str:
    """Return a node's address and the begin of its id, for people; for a process that is connected to the cluster."""
    import ray

    address = next((node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == node_id), "")
    return f"{address} ({node_id[:8]})" if address else node_id[:8]


def silent(node_ids: Iterable[str], timeout_s: float = 1.0) -> set[str]:
    """Return those of the nodes that are dead, or whose raylet takes no connection: Ray may not know it yet."""
    import ray

    addresses = {n["NodeID"]: (n["NodeManagerAddress"], n["NodeManagerPort"]) for n in ray.nodes() if n["Alive"]}
    wanted = sorted(set(node_ids))

    def answers(node_id: str) -> bool:
        try:
            socket.create_connection(addresses[node_id], timeout_s).close()
            return True
        except (KeyError, OSError):
            return False

    with ThreadPoolExecutor(32) as pool:
        return {node_id for node_id, reached in zip(wanted, pool.map(answers, wanted), strict=True) if not reached}


def free_cpus(nodes: Iterable[Node]) -> float:
    """Sum the CPUs that are free on the living nodes."""
    return sum(node.free_cpus for node in nodes if node.alive)


def free_gpus(nodes: Iterable[Node]) -> float:
    """Sum the GPUs that are free on the living nodes."""
    return sum(node.free_gpus for node in nodes if node.alive)


def _sorted(found: list[Node]) -> list[Node]:
    return sorted(found, key=lambda node: (not node.alive, not node.is_head, node.address, node.node_id))


def _node(entry: Any, used: dict[str, float]) -> Node:
    """Read one `ray.util.state.common.NodeState`."""
    is_alive, total = entry.state == "ALIVE", entry.resources_total or {}
    node = _of(entry.node_id, entry.node_ip, is_alive, bool(entry.is_head_node), total, entry.labels or {}, used)
    if is_alive:
        return node
    return replace(node, reason=entry.state_message or "", ended_at=(entry.end_time_ms or 0) / 1000)


def _told(entry: dict[str, Any], used: dict[str, float]) -> Node:
    """Read one of `ray.nodes()`."""
    total = entry["Resources"]
    is_head = HEAD_RESOURCE in total
    return _of(entry["NodeID"], entry["NodeManagerAddress"], entry["Alive"], is_head, total, entry["Labels"], used)


def _of(
    node_id: str,
    address: str,
    is_alive: bool,
    is_head: bool,
    total: Mapping[str, float],
    labels: Mapping[str, str],
    used: Mapping[str, float],
) -> Node:
    return Node(
        node_id=node_id,
        address=address,
        alive=is_alive,
        is_head=is_head,
        total_cpus=total.get("CPU", 0.0),
        free_cpus=max(0.0, total.get("CPU", 0.0) - used.get("CPU", 0.0)) if is_alive else 0.0,
        total_gpus=total.get("GPU", 0.0),
        free_gpus=max(0.0, total.get("GPU", 0.0) - used.get("GPU", 0.0)) if is_alive else 0.0,
        memory_bytes=int(total.get("memory", 0)),
        accelerator_type=labels.get(ACCELERATOR_LABEL),
        labels=dict(labels),
    )


def _used_by_dashboard() -> Used:
    return ray_internals.used_by_dashboard(get_json("/api/cluster_status"))
