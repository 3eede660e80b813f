"""The runtime environment that replicas have of their deploy job, and a model's own on top of it."""

from __future__ import annotations

import os
from typing import Any

import ray

from serve.tracing import destination

PASSED_ON = ("MLFLOW_TRACKING_URI", "TANDEM_HOME", "HF_HOME", "HF_HUB_OFFLINE")


def of_replicas() -> dict[str, Any]:
    """Return what replicas need of this job's environment: Tandem's code, the addresses it uses, and where spans go.

    Not all of it: a job's environment differs each time, and each difference would restart every replica.
    """
    modules = ray.get_runtime_context().runtime_env.get("py_modules")
    env_vars = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    env_vars |= destination.of_replicas(os.environ)
    return {"env_vars": env_vars, **({"py_modules": modules} if modules else {})}


def merged(environment: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Return a model's own runtime environment on top of what every replica needs, Tandem's code among it."""
    return {**environment, **own, "env_vars": {**environment["env_vars"], **own.get("env_vars", {})}}
