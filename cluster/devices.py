"""Ask nodes of the cluster what they are: one task each that reserves nothing, so it never waits."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from cluster import topology
from cluster.precision import Device, this_device

ANSWER_TIMEOUT_S = 60.0
Answer = TypeVar("Answer")


def ask(node_ids: Iterable[str], on_gpu: bool) -> list[Device]:
    """Return what each node computes with; for a process that is connected to the cluster.

    A node that says nothing counts as one that emulates bf16, and is named: a guess in the other direction would be ten
    times as slow.
    """
    wanted = sorted(set(node_ids))
    return with_silent(wanted, said_by(wanted, this_device, on_gpu))


def said_by(node_ids: Iterable[str], function: Callable[..., Answer], *arguments: Any) -> dict[str, Answer]:
    """Return what a function returns on each node, by node id; nodes that say nothing are left out.

    This process's own node is asked here and now.
    """
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    wanted = sorted(set(node_ids))
    task = ray.remote(num_cpus=0, max_retries=0)(function)
    asked = {}
    for node_id in wanted:
        if node_id != here:
            there = NodeAffinitySchedulingStrategy(node_id, soft=False)
            asked[task.options(scheduling_strategy=there).remote(*arguments)] = node_id
    said = {here: function(*arguments)} if here in wanted else {}
    for reference in ray.wait([*asked], num_returns=len(asked), timeout=ANSWER_TIMEOUT_S)[0] if asked else []:
        try:
            said[asked[reference]] = ray.get(reference)
        except RayError:  # its node is gone
            continue
    return said


def with_silent(node_ids: Sequence[str], said: Mapping[str, Device]) -> list[Device]:
    """Return a device for each node: what it said, or one that emulates bf16 for a node that said nothing. Pure."""
    return [
        said.get(node_id) or Device(False, f"node {node_id[:8]} did not say what it computes in")
        for node_id in node_ids
    ]


def able_to_hold(cpus: float, gpus: float) -> list[str]:
    """Return the ids of the living nodes that could take a process with so many CPUs and GPUs, were they free."""
    return [
        node.node_id for node in topology.nodes() if node.alive and node.total_cpus >= cpus and node.total_gpus >= gpus
    ]
