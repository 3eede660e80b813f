"""Which workers of a group really died, and of what: asked on their nodes, since Ray Train tells the first error only.

The rank that notices first says that its connection was closed; the one that was killed says nothing. The first rank of
a group notes every rank's node and process id (Attempt), and how often that node's kernel had killed for memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil

from cluster.ray_process_internals import WORKER_TITLE
from jobs.run_notes import Attempt

ANSWER_S = 10.0
Answer = TypeVar("Answer")


def of(attempt: Attempt) -> dict[int, bool]:
    """Return the ranks whose process is gone, each with whether its node's kernel has killed for memory meanwhile."""
    by_node: dict[str, list[int]] = {}
    for node, pid in zip(attempt.nodes, attempt.pids, strict=False):
        by_node.setdefault(node, []).append(pid)
    return gone(attempt, _ask(by_node))


def gone(attempt: Attempt, answers: Mapping[str, tuple[list[int], int]]) -> dict[int, bool]:
    """Compare what was noted with what the nodes answer; of one without an answer nothing is known. Pure.

    Args:
        answers: by node, which of its processes live, and its count of kills for memory.
    """
    found: dict[int, bool] = {}
    for rank, (node, pid) in enumerate(zip(attempt.nodes, attempt.pids, strict=False)):
        alive, kills = answers.get(node, ([pid], 0))
        if pid not in alive:
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


def state_of(node: str, pid: int) -> str | None:
    """Return how a worker's process on a node is, such as "stopped"; None where there is none, or no answer."""
    return _there(node, _state, pid)


def kill(node: str, pid: int) -> None:
    """Kill a worker's process on a node."""
    _there(node, _kill, pid)


def _state(pid: int) -> str | None:
    process = _worker(pid)
    return None if process is None else process.status()


def _kill(pid: int) -> None:
    process = _worker(pid)
    if process is not None:
        process.kill()


def _worker(pid: int) -> psutil.Process | None:
    """Return a living process of this node if it is one of Ray's workers: a number may be used again."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        command = process.cmdline() if process.status() != psutil.STATUS_ZOMBIE else []
        if command and command[0].startswith(WORKER_TITLE):
            return process
    return None


def _there(node: str, call: Callable[[int], Answer], pid: int) -> Answer | None:
    """Call a function on a node; None where that does not answer in time."""
    import ray

    if node == ray.get_runtime_context().get_node_id():
        return call(pid)
    with contextlib.suppress(ray.exceptions.RayError):
        answer: Answer = ray.get(_on(node, call).remote(pid), timeout=ANSWER_S)
        return answer
    return None


def _on(node: str, function: Callable[..., Any]) -> Any:
    """Make a Ray task of a function that takes no CPU and runs on one node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(function)


def _ask(by_node: Mapping[str, list[int]]) -> dict[str, tuple[list[int], int]]:
    """Have every node look for its processes, all at once; those that do not answer in time are left out."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    asked: dict[Any, str] = {}
    for node, pids in by_node.items():
        if node != here:
            asked[_on(node, look).remote(pids)] = node
    found = {here: look(by_node[here])} if here in by_node else {}
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_S) if asked else ([], [])
    for reference in answered:
        with contextlib.suppress(ray.exceptions.RayError):
            found[asked[reference]] = ray.get(reference)
    return found


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
