"""In which precision a run computes: decided once, before its workers start, and kept for as long as it goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cluster import devices
from cluster.precision import Decision, Device, Precision, decide
from jobs import progress, run_choices
from jobs.run_folder import RunFolder
from jobs.spec import JobSpec

SECTIONS = ("training", "evaluate", "quantize", "predict")
"""The parts of a spec that have a `precision`."""


def settle(spec: JobSpec, folder: RunFolder, placed: Mapping[str, int]) -> Decision:
    """Decide for the nodes that take the workers, or as an earlier attempt at the run did; note it and say it.

    Args:
        placed: how many workers each node takes, by node id; empty where the job waits for room.
    """
    wanted = spec.resources
    nodes = placed or devices.able_to_hold(wanted.cpus_per_worker, wanted.gpus_per_worker)
    decision = with_kept(spec, devices.ask(nodes, on_gpu=wanted.gpus_per_worker > 0), folder.precision())
    folder.keep_precision(decision.precision)
    progress.say(f"precision {decision.precision}: {decision.reason}")
    if decision.warning:
        progress.say(f"warning: {decision.warning}")
    return decision


def with_kept(spec: JobSpec, found: list[Device], kept: Precision | None) -> Decision:
    """Decide by the spec and the devices, but stay with what an earlier attempt chose. Pure."""
    if kept is None:
        return decide(spec.precision, found)
    return replace(decide(kept, found), reason="as the run began")


def in_params(spec: JobSpec, decision: Decision) -> dict[str, Any]:
    """Return the spec as the run's params show it: with what was decided instead of `auto`, or nothing yet."""
    resolved = spec.resolved()
    for section in SECTIONS:
        if (resolved.get(section) or {}).get("precision") == "auto":
            resolved[section]["precision"] = decision.precision
    return run_choices.without_open(resolved)
