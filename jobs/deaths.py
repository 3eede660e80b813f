"""Which workers of a group really died, and of what: asked on their nodes, since Ray Train tells the first error only.

The rank that notices first says that its connection was closed; the one that was killed says nothing. The first rank of
a group notes every rank's node and process id (Attempt), and how often that node's kernel had killed for memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import psutil

from jobs.run_folder import Attempt

ANSWER_S = 10.0


def of(attempt: Attempt) -> dict[int, bool]:
    """Return the ranks whose process is gone, each with whether its node's kernel has killed for memory meanwhile."""
    found: dict[int, bool] = {}
    for node in dict.fromkeys(attempt.nodes):
        ranks = [rank for rank, where in enumerate(attempt.nodes) if where == node and rank < len(attempt.pids)]
        alive, kills = _ask(node, [attempt.pids[rank] for rank in ranks])
        for rank in ranks:
            if alive is not None and attempt.pids[rank] not in alive:
                found[rank] = rank < len(attempt.oom_kills) and kills > attempt.oom_kills[rank]
    return found


def look(pids: Sequence[int]) -> tuple[list[int], int]:
    """Return which of these processes live on this node, and how often its kernel has killed for memory."""
    return [pid for pid in pids if _lives(pid)], oom_kills()


def oom_kills() -> int:
    """Return how many processes of this machine the kernel has killed for memory since it was started."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text(encoding="ascii").splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def _ask(node: str, pids: Sequence[int]) -> tuple[list[int] | None, int]:
    """Have a node look; (None, 0) where it does not answer."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if node == ray.get_runtime_context().get_node_id():
        return look(pids)
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    try:
        task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(look)
        alive, kills = ray.get(task.remote(list(pids)), timeout=ANSWER_S)
    except (ray.exceptions.RayError, TimeoutError):
        return None, 0
    return alive, kills


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
