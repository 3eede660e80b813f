"""Warm worker processes: started and imported ahead, so that a group of workers begins in a second, not in ten.

They import while the data is being prepared, and again while training runs, for the group that follows a failure.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING

from cluster import cuda_internals, fork_client, prestart, ray_process_internals
from jobs import noise
from jobs.checkpoint import torch_internals

if TYPE_CHECKING:
    from jobs.spec import JobSpec

WORKER = {ray_process_internals.HOOK_VARIABLE: "jobs.driver.warm.import_for_training"}
"""What the environment of a process that computes holds besides."""
OURS = {"working_dir", "py_modules", "excludes", "env_vars", "config"}
VARIABLES = ("TANDEM_", "MLFLOW_", "RAY_")
"""How the variables begin that no library reads while it is imported."""
OF_RAY = ("jsonschema", "fsspec", "pydantic.dataclasses", "uvloop")
"""What Ray and Ray Train import that is not theirs, and that nothing above imports."""
DRIVES = "TANDEM_DRIVES"
"""A variable of a fork server that a driver has started: others will follow."""
FORK_HOOK = "jobs.driver.warm:import_before_ray"
"""What a fork server does first."""


def environment(spec: JobSpec) -> dict[str, str]:
    """Return the variables of all of the job's processes but the driver: those that compute, and Ray Train's actors."""
    return _environment(on_gpu=spec.resources.gpus_per_worker > 0)


def _environment(*, on_gpu: bool) -> dict[str, str]:
    return {
        **noise.ENVIRONMENT,
        **torch_internals.HUGE_PAGES,
        # Ray Train's own actors look for the cluster by themselves, and find two where two run on one machine.
        **{name: os.environ[name] for name in ("RAY_ADDRESS",) if name in os.environ},
        "DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cuda") if on_gpu else "cpu",  # else it wakes the GPU
        **ray_process_internals.CONTROLLER_SETTINGS,
        ray_process_internals.HOOK_VARIABLE: "jobs.driver.warm.import_for_control",
    }


def shadow(module: str) -> int | None:
    """Have this process's work done by one that is forked with the imports made, and return its exit code.

    None: this process has to do it.

    Args:
        module: what this process runs, as `python -m` does.
    """
    if not _may_be_forked():
        return None
    return fork_client.shadow(FORK_HOOK, module, {**os.environ, **_environment(on_gpu=False), DRIVES: "1"})


def executable() -> dict[str, str]:
    """Return the part of the runtime environment that has the job's processes forked from one that has imported."""
    return {"py_executable": fork_client.py_executable(FORK_HOOK)} if _may_be_forked() else {}


def _may_be_forked() -> bool:
    """Say whether this job's processes may be forked.

    Not where it has an environment of its own, of which something may act while libraries are imported.
    """
    return is_ours(os.environ.get(ray_process_internals.JOB_MARKER, ""))


def is_ours(marker: str) -> bool:
    """Say whether a job's runtime environment, as Ray tells its driver, is no more than Tandem's own. Pure."""
    try:
        described = json.loads(marker or "{}").get("runtime_env") or {}
        return described.keys() <= OURS and all(name.startswith(VARIABLES) for name in described.get("env_vars", {}))
    except (ValueError, AttributeError):
        return False


def start(placed: Mapping[str, int], *, controller: bool = False, spare: bool = False) -> None:
    """Have processes for workers started, by node id, and on this node those that Ray Train needs besides.

    Args:
        controller: the controller, and the actor by which its workers meet.
        spare: that actor alone: it belongs to the group.
    """
    import ray

    if controller or spare:
        prestart.prestart({ray.get_runtime_context().get_node_id(): 2 if controller else 1}, {})
    prestart.prestart(placed, WORKER)


def import_before_ray() -> None:
    """Import what a worker needs, but for Ray: what the fork server does.

    Raises:
        CannotFork: what is forked could not use a GPU (cluster/cuda_internals.py), and is to.
    """
    for_cpus = os.environ.get("DS_ACCELERATOR") == "cpu"
    with nullcontext() if for_cpus else cuda_internals.asleep():
        _import()


def _import() -> None:
    from jobs.worker.deepspeed_internals import import_deepspeed

    noise.quiet()
    import_deepspeed()  # before transformers imports it at full length
    modules = ["transformers.modeling_utils", "pyarrow.dataset", "pyarrow.parquet", "jobs.worker.loop", *OF_RAY]
    if os.environ.get(DRIVES):
        modules += ["jobs.driver.attempt", "mlflow.tracking"]
    for module in modules:
        importlib.import_module(module)


def import_for_training() -> None:
    """Import what a worker needs."""
    _import()
    importlib.import_module("ray.train.torch")


def import_for_control() -> None:
    """Import what Ray Train's controller needs."""
    noise.quiet()
    importlib.import_module("ray.train.torch")
