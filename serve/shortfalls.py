"""What an endpoint lacks of what its spec asks for, in sentences: `serve status` says it, and ends with exit code 1.

Pure, over what Ray Serve's REST API tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def found(status: Mapping[str, Any]) -> list[str]:
    """List what is missing of what `serve.endpoints.status` returns; an empty list: all is well."""
    named = {**status["models"], "(gateway)": status["gateway"]}
    return [
        *(_unreachable(status)),
        *(f"{name}: {sentence}" for name, model in named.items() if (sentence := of_model(model))),
    ]


def of_model(model: Mapping[str, Any]) -> str | None:
    """Say what one model lacks: it does not run, fewer replicas do than are wanted, or there is no room for them.

    While load adds replicas, as many as the spec asks for at least are enough.
    """
    running, target = model["replicas"]["running"], model["replicas"]["target"]
    if model["status"] == "RUNNING" and running >= model["replicas"]["least"] and not model.get("no_room"):
        return None
    told = f"{model['status'].lower()}, {running} of {target} replicas run"
    reasons = " ".join(each for each in (model.get("no_room"), model["message"]) if each)
    return f"{told}: {reasons}" if reasons else told


def left_over(applications: Mapping[str, Any], name: str) -> list[str]:
    """List the applications of the endpoint `name` that are there after it was to be stopped."""
    return sorted(app for app in applications if app == name or app.startswith(f"{name}."))


def _unreachable(status: Mapping[str, Any]) -> list[str]:
    if status["reachable"]:
        return []
    return [
        f"{status['endpoint']} does not answer from here: a gateway that hangs is replaced within half a "
        "minute; if this stays, `tandem serve down` and `tandem serve up SPEC`"
    ]
