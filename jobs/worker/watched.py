"""A task of a phase that has no worker group, under a watchdog: one that hangs ends, and Ray tries it again."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

from jobs.run_folder import RunFolder
from jobs.storage.arrival import await_copy
from jobs.worker.evaluate import unsaid
from jobs.worker.watchdog import Pulse, Watchdog


def watched(
    run: RunFolder, token: str, longest_s: float, rank: int, function: Callable[..., Any], *arguments: Any
) -> Any:
    """Return `function(*arguments, during=…, say=…)`.

    What goes on within `during(name)` has a limit of its own; what `say` is given gets into the job's log and its run.

    Args:
        token: what says that the run's folder on this node is complete; "" where all nodes share it.
        longest_s: how long whatever has not been measured yet may take.
        rank: tells its stacks and its sign of life from those of other tasks.
    """
    import ray

    if token:
        await_copy(run.path, token)
    attempt = f"task-{secrets.token_hex(4)}"
    pulse = Pulse(run.pulse(attempt, rank), ray.get_runtime_context().get_node_id())
    watchdog = Watchdog(run.stacks(attempt, rank), longest_s, pulse)
    try:
        return function(*arguments, during=watchdog.during, say=run.add_remarks if rank == 0 else unsaid)
    finally:
        watchdog.stop()
