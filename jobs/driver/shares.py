"""Plain Ray tasks for what needs no worker group: each has the resources of a worker of the job, and a watchdog."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cluster.results import result_of
from jobs.driver import warm
from jobs.driver.job import Job
from jobs.spec_sections import ResourcesSpec


class TaskHung(RuntimeError):
    """A task of a phase that has no worker group hung."""


def workers(wanted: ResourcesSpec, placed: Mapping[str, int]) -> int:
    """Return how many workers share the work: as many as the cluster had room for when the job began. Pure.

    Args:
        placed: how many each node could take then, by node id; empty where the job has to wait for room.
    """
    return max(wanted.fewest, min(wanted.most, sum(placed.values())))


def begin(job: Job, token: str, rank: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """Start a Ray task with the resources and the environment of one of the job's workers, under a watchdog.

    Args:
        token: what it waits for on its node (jobs/storage/courier.py); "" where all nodes share the job's folder.
    """
    import ray

    from jobs.worker.watched import watched

    wanted = job.spec.resources
    options = {
        "num_cpus": wanted.cpus_per_worker,
        "num_gpus": wanted.gpus_per_worker,
        "max_retries": job.spec.max_failures,
        "runtime_env": {"env_vars": warm.WORKER},
    }
    remote = ray.remote(**options)(watched)
    return remote.remote(job.folder, token, job.spec.failures.hang_after_s, rank, function, *arguments)


def result(job: Job, reference: Any) -> Any:
    """Return what a task returned.

    Raises:
        TaskHung: it hung, each time that Ray began it.
    """
    import ray

    try:
        return result_of(reference)
    except ray.exceptions.WorkerCrashedError as error:
        if job.folder.hung_attempts():
            tried = f"{job.spec.max_failures + 1} times in a row"
            raise TaskHung(f"it did nothing within its limit, {tried} (failures.hang_after_s)") from error
        raise
