"""Time series out of rows: values on a grid of steps, NaN where a step is missing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from jobs.tasks import TaskError, time_steps
from jobs.tasks.grouping import moments
from jobs.tasks.time_steps import Step

DRAWN = 6
"""So many series are drawn."""
ENDS = 20_000
"""Of so many series it is kept when they end."""
LARGEST = 1e37
"""Values are read as 32-bit numbers, and sums of many must be finite."""
COARSE = 0.01
"""From this share of a series' deviation on, rounding to 32 bits changes what it shows."""


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
    when: list[float] = field(default_factory=list)
    """The moment of each row."""

    @property
    def missing(self) -> int:
        """How many steps have no value."""
        return int(np.isnan(self.values).sum())

    @property
    def is_sparse(self) -> bool:
        """Tell whether fewer than half of its steps have a value."""
        return 2 * self.missing > len(self.values)

    @property
    def is_coarse(self) -> bool:
        """Tell whether 32-bit numbers lose how it varies, around a level that is far higher."""
        there = self.values[~np.isnan(self.values)]
        lost = np.abs(there - there.astype(np.float32)).max(initial=0.0)
        return bool(len(there) and there.max() > there.min() and lost > COARSE * there.std())

    def moment_of(self, step: int) -> float | None:
        """Return the moment of the first row at a step or behind it."""
        return next((when for place, when in zip(self.places, self.when, strict=False) if place >= step), None)


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
    if abs(number) > LARGEST:
        raise TaskError(f"column {column!r} holds {value!r:.60}; numbers to {LARGEST:g} are read: take a larger unit")
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
    return Series("" if series is None else str(example[series]), values, places, step, moments(stamps))


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
    ends: dict[str, float] = field(default_factory=dict)
    """The last moment of each series by its name, of the first `ENDS`."""

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
            {series.name: series.when[-1] for series in chunk[:ENDS]},
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
            dict(islice({**self.ends, **later.ends}.items(), ENDS)),
        )
