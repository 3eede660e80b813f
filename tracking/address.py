"""Where the tracking server is: the argument, the environment, or this machine's embedded cluster."""

import json
import os

from cluster.home import home
from tracking.errors import TrackingError


def tracking_uri(explicit: str | None = None) -> str:
    """Return the MLflow address; raise TrackingError when neither a caller, the environment nor a cluster gives one."""
    found = explicit or known_uri()
    if not found:
        raise TrackingError("no tracking server: run `tandem cluster up` or set MLFLOW_TRACKING_URI")
    return found.rstrip("/")


def known_uri() -> str | None:
    """Return the address that the environment or a cluster on this machine gives, if one does."""
    return os.environ.get("MLFLOW_TRACKING_URI") or _embedded()


def _embedded() -> str | None:
    """Read the address that `tandem cluster up` left in its state file, if there is one."""
    try:
        state = json.loads((home() / "cluster.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state.get("mlflow_url") if isinstance(state, dict) else None
