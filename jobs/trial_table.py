"""The table of a sweep's trials: a line of the job's log for each change, and what a reader makes of all of them.

tandem: trial {"number": 3, "of": 12, "state": "running", "step": 90, "steps": 270, "metric": "accuracy", …}
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

_LINE = re.compile(r"^tandem: trial (\{.*\})\s*$")
MOST_ROWS = 20
"""The best and the running ones; a terminal has no room for a thousand."""


@dataclass(frozen=True)
class TrialLine:
    """How one trial stands."""

    number: int
    of: int
    state: str
    """running, or how it ended: finished, stopped, out of time, failed."""
    step: int
    steps: int
    metric: str
    value: float | None
    values: Mapping[str, Any]
    """Dotted path of a field → its value."""
    best: bool = False
    """Whether it is the best one that has finished so far."""
    reason: str = ""


def show(line: TrialLine) -> None:
    """Print how a trial stands."""
    print(f"tandem: trial {json.dumps(asdict(line))}", flush=True)


def parse(text: str) -> TrialLine | None:
    """Read a line back; None for any other line."""
    match = _LINE.match(text)
    return TrialLine(**json.loads(match[1])) if match else None


def sentence(line: TrialLine) -> str:
    """Say how a trial stands. Pure."""
    state = {"running": f"step {line.step}/{line.steps}"}.get(line.state, line.state)
    if line.state in ("stopped", "out of time"):
        state = f"{line.state} at step {line.step}/{line.steps}"
    measured = f", {line.metric} {line.value:.4g}" if line.value is not None else ""
    told = f": {line.reason}" if line.reason else ""
    return (
        f"trial {line.number + 1}/{line.of} ({in_short(line.values)}): {state}{measured}{told}"
        f"{' (the best so far)' if line.best else ''}"
    )


def in_short(values: Mapping[str, Any]) -> str:
    """Say the values of a trial, each by the last part of its field. Pure."""
    return ", ".join(f"{path.rpartition('.')[2]} {_shown(value)}" for path, value in values.items())


def columns(lines: Iterable[TrialLine]) -> list[list[str]]:
    """Return the table: a heading, then a row for each trial, those that run first, then the newest. Pure."""
    rows = sorted(lines, key=lambda line: (line.state != "running", not line.best, -line.number))[:MOST_ROWS]
    if not rows:
        return []
    fields = list(rows[0].values)
    heading = ["trial", *(path.rpartition(".")[2] for path in fields), "step", rows[0].metric, "state"]
    return [heading, *([*_row(line, fields)] for line in rows)]


def _row(line: TrialLine, fields: list[str]) -> list[str]:
    value = f"{line.value:.4g}" if line.value is not None else ""
    state = f"{line.state}{' ← best' if line.best else ''}"
    values = [_shown(line.values.get(path)) for path in fields]
    return [str(line.number + 1), *values, f"{line.step}/{line.steps}", value, state]


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
