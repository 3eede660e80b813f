"""What is known of a sweep's trials: a journal of what happened, and what follows from it.

<sweep's folder>/trials.jsonl     one line an event: a trial begins, has measured, has ended

A trial that has ended is never made again; one that has not goes on when the sweep does, with the values it had.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

from cluster.errors import UserError

FILE = "trials.jsonl"
LONGEST_LINE = 1 << 20
Ended = Literal["finished", "stopped", "out of time", "failed"]
"""How a trial ended: at its end, by the scheduler, by the sweep's time budget, by an error."""


class DamagedJournal(UserError):
    """What is written down of a sweep's trials cannot be read."""


@dataclass(frozen=True)
class Trial:
    """One trial, as far as it is known."""

    number: int
    """From 0."""
    values: Mapping[str, Any]
    """Dotted path of a field → its value."""
    run: str = ""
    """Key of its run; "" where none was begun."""
    steps: int = 0
    """Optimiser steps up to its end; 0: not known."""
    evaluations: tuple[tuple[int, float], ...] = ()
    """(step, metric) of each evaluation so far, but the one before the first step."""
    ended: Ended | None = None
    value: float | None = None
    """The metric at its end, or at the last evaluation before."""
    reason: str = ""
    """Why it failed."""

    @property
    def is_whole(self) -> bool:
        """Whether it was trained to its end, and has a model."""
        return self.ended == "finished"


@dataclass
class Journal:
    """The events of a sweep, on the disk."""

    path: Path
    trials: list[Trial] = field(default_factory=list)

    @staticmethod
    def read(folder: Path) -> Journal:
        """Return what an earlier attempt at the sweep has written down.

        Raises:
            DamagedJournal: a line of it is no event of a trial.
        """
        path = folder / FILE
        trials: list[Trial] = []
        with suppress(FileNotFoundError):
            lines = path.read_bytes().split(b"\n")
            for number, line in enumerate(lines[:-1], 1):  # the last line is empty, or half a line
                try:
                    trials = after(trials, json.loads(line))
                except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
                    raise DamagedJournal(
                        f"{path}:{number} is damaged ({error}): bring it back, or begin a new sweep with --set "
                        "checkpoint.resume=never"
                    ) from error
        return Journal(path, trials)

    def add(self, event: Mapping[str, Any]) -> Trial:
        """Write an event down, and return the trial as it is now."""
        self.trials = after(self.trials, event)
        with self.path.open("ab+") as file:
            file.truncate(_whole(file))
            file.write(json.dumps(event).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        return self.trials[event["trial"]]


def _whole(file: BinaryIO) -> int:
    """Return where the last whole line ends: a driver that was killed may have left half a line behind it."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - LONGEST_LINE))
    tail = file.read()
    return size - len(tail) + tail.rfind(b"\n") + 1


def after(trials: Sequence[Trial], event: Mapping[str, Any]) -> list[Trial]:
    """Return the trials after an event. Pure.

    Args:
        event: `trial` with `values` (and `run`, `steps`): it begins, or is known better; with `step` and `value`: it
            has measured; with `ended`.
    """
    number = event["trial"]
    known = [*trials, Trial(number, event["values"])] if number == len(trials) else list(trials)
    trial, changes = known[number], {key: value for key, value in event.items() if key != "trial"}
    if "step" in event:
        measured = (int(event["step"]), float(event["value"]))
        others = (seen for seen in trial.evaluations if seen[0] != measured[0])
        changes = {"evaluations": tuple(sorted((*others, measured))), "value": measured[1]}
    elif event.get("ended", "finished") not in get_args(Ended):
        raise ValueError(f"a trial cannot end {event['ended']!r}")
    known[number] = replace(trial, **changes)
    return known


def better(mode: str, one: float | None, other: float | None) -> bool:
    """Say whether a metric's value is better than another one; what is not known or not finite is worse. Pure."""
    if one is None or not math.isfinite(one):
        return False
    if other is None or not math.isfinite(other):
        return True
    return one > other if mode == "max" else one < other


def best(trials: Iterable[Trial], mode: str) -> Trial | None:
    """Return the best trial that has a model; of equal ones the first. Pure."""
    found = None
    for trial in trials:
        if trial.is_whole and better(mode, trial.value, found.value if found else None):
            found = trial
    return found


def counts(trials: Iterable[Trial]) -> str:
    """Say how the trials ended: `7 finished, 4 stopped, 1 failed`. Pure."""
    of = Counter(trial.ended or "not ended" for trial in trials)
    return ", ".join(f"{of[kind]} {kind}" for kind in (*get_args(Ended), "not ended") if of[kind])


def rows(trials: Iterable[Trial], metric: str) -> list[dict[str, Any]]:
    """Return the table of the trials, a row each, numbered from 1: how it ended, its metric, its values. Pure."""
    return [
        {
            "trial": trial.number + 1,
            "run": trial.run,
            "ended": trial.ended or "",
            "step": trial.steps if trial.is_whole else trial.evaluations[-1][0] if trial.evaluations else 0,
            metric: trial.value,
            **trial.values,
            "reason": trial.reason,
        }
        for trial in trials
    ]


def as_json(trials: Sequence[Trial], metric: str) -> str:
    """Return the table, with what each trial measured on its way: [step, metric] each. Pure."""
    both = zip(rows(trials, metric), trials, strict=True)
    return json.dumps([{**row, "evaluations": trial.evaluations} for row, trial in both], indent=2)
