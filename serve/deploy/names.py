"""Names of what Tandem deploys on Ray Serve, and the log that its replicas write."""

from __future__ import annotations

import logging

ENGINE = "engine"
GATEWAY = "gateway"


def model_app(name: str, model: str) -> str:
    """Return the name of the Serve application of one model."""
    return f"{name}.{model}"


def log_with_serve() -> None:
    """Send what our modules log to the replica's log: Ray Serve keeps that for its own logger, `ray.serve`, alone."""
    ours = logging.getLogger("serve")
    ours.handlers = list(logging.getLogger("ray.serve").handlers)
    ours.setLevel(logging.INFO)
