"""Time series out of rows: values on a grid of steps, NaN where a step is missing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jobs.tasks import TaskError, time_steps
from jobs.tasks.time_steps import Step

DRAWN = 6
"""So many series are drawn."""


@dataclass(frozen=True)
class Series:
    """One series."""

    name: str
    values: np.ndarray
    """float64 (n,), NaN where there is no value."""
    places: list[int]
    """Which step each row of the data is."""
    step: Step | None
    """What its own stamps say, or what was asked for."""

    @property
    def missing(self) -> int:
        """How many steps have no value."""
        return int(np.isnan(self.values).sum())


def value_of(value: Any, column: str, may_lack: bool) -> float:
    """Return a value as a number, NaN where there is none and that is allowed.

    Raises:
        TaskError: it is no number, or infinite, or there is none.
    """
    try:
        number = math.nan if value is None or value == "" else float(value)
    except (TypeError, ValueError):
        number = math.inf
    if isinstance(value, bool) or math.isinf(number):
        raise TaskError(f"column {column!r} holds {value!r:.60}, which is no number")
    if math.isnan(number) and not may_lack:
        raise TaskError(f"column {column!r} holds no value; task.gaps: missing keeps such steps, unlearned")
    return number


def series_of(
    example: Mapping[str, Any], series: str | None, time: str, target: str, step: Step | None, may_lack: bool
) -> Series:
    """Read a series.

    Args:
        example: lists of its rows, in the order of `time`.
        series, time, target: names of columns.
        step: None: as its own stamps say.
        may_lack: steps may be missing.

    Raises:
        TaskError: stamps are not regular, or steps are missing and may not.
    """
    stamps = list(example[time])
    usual = time_steps.inferred(stamps)
    step = step or usual
    places = time_steps.places(stamps, step)
    gap = next((at for at in range(1, len(places)) if places[at] > places[at - 1] + 1), None)
    if gap is not None and not may_lack:
        lost = places[gap] - places[gap - 1] - 1
        raise TaskError(
            f"{lost} step(s) of {step} are missing between {stamps[gap - 1]!r:.40} and {stamps[gap]!r:.40}; "
            + ("task.gaps: missing keeps them, without a value" if usual == step else f"a step here is a {usual}")
        )
    values = np.full(places[-1] + 1, np.nan)
    values[places] = [value_of(value, target, may_lack) for value in example[target]]
    return Series("" if series is None else str(example[series]), values, places, step)


@dataclass(frozen=True)
class SeriesFindings:
    """What series say, out of one chunk or many."""

    steps: Counter[Step] = field(default_factory=Counter)
    series: int = 0
    values: int = 0
    missing: int = 0
    longest: int = 0
    first: tuple[str, ...] = ()
    """The names of the first few."""

    @classmethod
    def of(cls, chunk: Sequence[Series]) -> SeriesFindings:
        """Return what the series of a chunk say."""
        return cls(
            Counter(series.step for series in chunk if series.step is not None),
            len(chunk),
            sum(len(series.values) for series in chunk),
            sum(series.missing for series in chunk),
            max((len(series.values) for series in chunk), default=0),
            tuple(series.name for series in chunk[:DRAWN]),
        )

    def merged(self, later: SeriesFindings) -> SeriesFindings:
        """Return the findings of both chunks."""
        return SeriesFindings(
            self.steps + later.steps,
            self.series + later.series,
            self.values + later.values,
            self.missing + later.missing,
            max(self.longest, later.longest),
            (self.first + later.first)[:DRAWN],
        )
