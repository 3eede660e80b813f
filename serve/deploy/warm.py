"""What a node's fork server imports for replicas of models, so that another replica is there in a second or two."""

from __future__ import annotations

import importlib
from typing import Any

from cluster import fork_client
from serve.deploy.plan import ServedModel
from serve.spec import ModelServeSpec

ENGINES = ("torch", "task")
"""The engines that run in Tandem's own environment."""


def executable(model: ServedModel, settings: ModelServeSpec) -> dict[str, Any]:
    """Return the part of a runtime environment that has a model's replicas forked: where they compute on CPUs.

    Not in an environment of the model's own (another Python, other packages), and not with GPUs: libraries that look
    for one while they are imported leave a CUDA that cannot be forked.
    """
    foreign = settings.runtime_env.keys() - {"env_vars"}
    if model.engine not in ENGINES or settings.resources.gpus_per_replica or foreign:
        return {}
    return {"py_executable": fork_client.py_executable("serve.deploy.warm:import_before_ray")}


def import_before_ray() -> None:
    """Import what a replica needs, but for Ray."""
    modules = (
        "serve.engines.torch.torch_engine",
        "serve.engines.replica",
        "serve.engines.predictive",
        "jobs.tasks",
        "llguidance",
        "fastapi",
    )
    for module in modules:
        importlib.import_module(module)
