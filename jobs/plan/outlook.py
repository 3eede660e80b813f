"""What one run should take, in short, and what it took: a line for the reader, numbers for MLflow. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tracking.plan_errors import ENERGY, MEASURED_MEMORY, MEASURED_STEP, PLANNED_MEMORY, PLANNED_STEP

GIB, MIB = 1 << 30, 1 << 20
PEAK = "peak_memory_bytes/rank-"
"""How the metrics of each rank's memory begin."""
STEP = "step_time_s"


@dataclass(frozen=True)
class Outlook:
    """What was expected of one start of a worker group, and what was measured of it. None: not known."""

    workers: int
    layout: str
    """ZeRO stage, offload and precision, for a reader."""
    room_bytes: int
    """The memory that there is for a worker."""
    peak_bytes: int | None = None
    step_s: float | None = None
    duration_s: float | None = None
    rates: str = ""
    """What the times go by."""
    advice: str = ""
    """What would take less, where it may not fit."""
    said: tuple[str, ...] = ()
    """What was assumed, or why there is no figure."""
    time_ms: int = 0
    """When it was made."""
    measured_peak_bytes: int | None = None
    """Of the rank that took most."""
    measured_step_s: float | None = None
    """Of the median step."""
    measured_joules: float | None = None
    """Of all ranks' GPUs, over all starts of the run; None where NVML tells none."""


def line(outlook: Outlook) -> str:
    """Return what is expected, in one line."""
    workers = f"{outlook.workers} worker{'' if outlook.workers == 1 else 's'}, {outlook.layout}"
    if outlook.peak_bytes is None:
        room = f"; {size(outlook.room_bytes)} for each of {workers}" if outlook.room_bytes else ""
        return f"plan: memory is not known ({'; '.join(outlook.said[:1])}){room}"
    memory = f"{size(outlook.peak_bytes)} of {size(outlook.room_bytes)} for each of {workers}"
    advice = f"; {outlook.advice}" if outlook.advice else ""
    return f"plan: {memory}; {_time(outlook)}{advice}"


def _time(outlook: Outlook) -> str:
    if outlook.step_s is None:
        return "no time without rates (tandem jobs plan --calibrate)"
    if outlook.duration_s is None:
        return f"{duration(outlook.step_s)} a step by {outlook.rates}"
    return f"{duration(outlook.duration_s)} ({duration(outlook.step_s)} a step) by {outlook.rates}"


def size(count: int) -> str:
    """Return bytes in the unit that reads best."""
    return f"{count / GIB:,.1f} GiB" if count >= GIB else f"{count / MIB:,.0f} MiB"


def duration(seconds: float) -> str:
    """Return a time in the unit that reads best."""
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def measured(outlook: Outlook, steps: Sequence[Mapping[str, Any]], memory: Iterable[Mapping[str, Any]]) -> Outlook:
    """Return an outlook with what was measured beside it.

    Args:
        steps: lines of the first rank's spool, `{"step", "time_ms", "metrics"}`, the newest last.
        memory: lines of the spools of all ranks' memory. What is older than the outlook is of an earlier start.
    """
    times = [entry["metrics"][STEP] for entry in _since(outlook, steps) if STEP in entry["metrics"]]
    peaks = [
        value for entry in _since(outlook, memory) for key, value in entry["metrics"].items() if key.startswith(PEAK)
    ]
    return replace(
        outlook,
        measured_step_s=statistics.median(times) if times else None,
        measured_peak_bytes=int(max(peaks)) if peaks else None,
    )


def _since(outlook: Outlook, entries: Iterable[Mapping[str, Any]]) -> Iterable[Mapping[str, Any]]:
    return (entry for entry in entries if entry["time_ms"] >= outlook.time_ms)


def metrics(outlook: Outlook) -> dict[str, float]:
    """Return what is known, by the names of MLflow's metrics."""
    found = {
        PLANNED_MEMORY: outlook.peak_bytes,
        PLANNED_STEP: outlook.step_s,
        MEASURED_MEMORY: outlook.measured_peak_bytes,
        MEASURED_STEP: outlook.measured_step_s,
        ENERGY: outlook.measured_joules,
    }
    return {name: float(value) for name, value in found.items() if value is not None}
