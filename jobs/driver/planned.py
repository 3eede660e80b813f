"""What a run's newest start should take: said in the job's log and noted in MLflow, at the end with what it took."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs import progress
from jobs.plan import outlook
from jobs.plan.outlook import Outlook
from jobs.run_folder import RunFolder
from jobs.worker import energy
from tracking.plan_errors import LAYOUT_TAG
from tracking.run import Run

TAIL_BYTES = 1 << 20
"""So much of the steps' spool is read: some thousand steps."""

Track = Callable[[Callable[[Run], object]], None]


def say(folder: RunFolder, said: Outlook | None, track: Track) -> Outlook | None:
    """Say what the newest start should take, unless it is what was `said` before; return it."""
    try:
        found = folder.outlook()
    except (OSError, ValueError):  # damaged: an estimate is worth no run
        return said
    if found is None or (said is not None and found.time_ms == said.time_ms):
        return said
    progress.say(outlook.line(found))
    by = f", time by {found.rates}" if found.rates else ""
    tags = {LAYOUT_TAG: f"{found.workers} × {found.layout}{by}"}
    track(lambda run: run.set_tags(tags))
    track(lambda run: run.log_metrics(outlook.metrics(found)))
    return found


def settle(folder: RunFolder, track: Track) -> None:
    """Note what the newest start took, beside what was expected: in the run's folder and in MLflow."""
    with suppress(OSError, ValueError):  # a note that is damaged or cannot be written costs the run nothing else
        found = folder.outlook()
        if found is None:
            return
        memory = [entry for file in sorted(folder.spool.glob("memory-rank-*.jsonl")) for entry in _lines(file)]
        taken = outlook.measured(found, _lines(folder.rank_0_spool), memory)
        taken = replace(taken, measured_joules=joules(folder))
        folder.write_outlook(taken)
        track(lambda run: run.log_metrics(outlook.metrics(taken)))


def joules(folder: RunFolder) -> float | None:
    """Return the energy of the run's GPUs over all its starts; None where a rank of the newest one told none."""
    told = [
        [value for entry in _lines(file) for value in entry["metrics"].values()]
        for file in sorted(folder.spool.glob("energy-rank-*.jsonl"))
    ]
    attempt = folder.attempt()
    enough = attempt is not None and len(told) >= attempt.workers
    return sum(energy.total(values) for values in told) if told and enough else None


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return the newest records of a spool; a half line, as a killed writer leaves it, is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL_BYTES))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        with suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict) and isinstance(entry.get("metrics"), dict) and "time_ms" in entry:
                found.append(entry)
    return found
