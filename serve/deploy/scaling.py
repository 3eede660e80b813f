"""What `serve up` says about scaling: with how many replicas it begins, and what the loop in the state actor may do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from serve.deploy import ray_serve_internals
from serve.scaling.decider import Plan
from serve.scaling.decisions import GATEWAY_ROW
from serve.scaling.requests import OPEN_REQUESTS
from serve.scaling.settings import Scaled
from serve.scaling.steps import Bounds
from serve.spec import ServeSpec


def begin(scaled: Scaled, there: int | None) -> int:
    """Return how many replicas `up` asks for: those that load has brought, within the bounds, and one at least. Pure.

    Args:
        there: as many as Serve aims at now; None where it is new.
    """
    return max(scaled.at_start, min(scaled.bounds.max, there or 0))


def there() -> dict[str, int]:
    """Return by application how many replicas Serve aims at; each of ours has one deployment."""
    return {
        name: int(deployment["target_num_replicas"])
        for name, application in ray_serve_internals.running_applications().items()
        for deployment in application["deployments"].values()
    }


def plans(spec: ServeSpec, versions: Mapping[str, str]) -> dict[str, Any]:
    """Return what may scale and how, as the gateway's configuration keeps it; without fixed numbers. Pure.

    Args:
        versions: by model, what changes with whatever changes a replica's speed.
    """
    found = {
        name: Plan(_bounds(model), versions[name], slots=model.max_batch)
        for name, model in spec.models.items()
        if model.scales
    }
    if spec.gateway.scales:
        each = spec.gateway.bounds.target_ongoing or OPEN_REQUESTS
        found[GATEWAY_ROW] = Plan(_bounds(spec.gateway), "", requests=each)
    return {name: each.as_config() for name, each in found.items()}


def _bounds(scaled: Scaled) -> Bounds:
    bounds = scaled.bounds
    return Bounds(bounds.min, bounds.max, hold_s=scaled.downscale_delay_s, up_after_s=scaled.upscale_delay_s)
