"""What a node's fork server imports for replicas of models, so that another replica is there in a second or two."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from cluster import fork_client
from serve.deploy.plan import ServedModel
from serve.engines import table
from serve.engines.table import EngineEntry
from serve.spec import ModelServeSpec

AROUND_ENGINES = ("serve.engines.replica", "fastapi")
"""What a replica imports whatever its engine."""
OF_RAY = ("pandas", "requests", "jsonschema", "uvicorn", "uvloop")
"""What Ray and Ray Serve import that is not theirs, and that takes them half a second."""


def executable(model: ServedModel, settings: ModelServeSpec) -> dict[str, Any]:
    """Return the part of a runtime environment that has a model's replicas forked: where they compute on CPUs.

    Not where the engine says no, not in an environment of the model's own (another Python, other packages; variables
    too, since many are read only while Python or a library starts), and not with GPUs: libraries that look for one
    while they are imported leave a CUDA that cannot be forked.
    """
    if not table.get(model.engine).forked or settings.resources.gpus_per_replica or settings.runtime_env:
        return {}
    return {"py_executable": fork_client.py_executable("serve.deploy.warm:import_before_ray")}


def import_before_ray() -> None:
    """Import what a replica needs, but for Ray. One server forks the replicas of all engines."""
    for module in preloaded(table.ENGINES):
        importlib.import_module(module)


def preloaded(engines: Mapping[str, EngineEntry]) -> list[str]:
    """List what the server imports for the engines that are forked, each module once."""
    wanted = [module for engine in engines.values() if engine.forked for module in engine.preload]
    return list(dict.fromkeys((*wanted, *AROUND_ENGINES, *OF_RAY)))
