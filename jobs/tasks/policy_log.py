"""Logs of what was observed and what was done: rows read, counted over chunks, and what the actions are. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jobs.tasks import TaskError
from jobs.tasks.cells import read, spelling
from jobs.tasks.labels import column_of
from jobs.tasks.row_sample import RowSample
from jobs.tasks.table_findings import Tally

Kind = Literal["discrete", "continuous"]
FEW = 20
"""With more different whole numbers than this, they are no names of actions."""
MOST_LABELS = 1_000
VALUES = 4_000_000
"""Numbers that are kept of a draw of rows."""


@dataclass(frozen=True)
class Names:
    """The columns of a log."""

    observation: str = "observation"
    observations: tuple[str, ...] = ()
    """Columns of a number each, in place of the one that holds all."""
    action: str = "action"
    actions: tuple[str, ...] = ()

    @property
    def read(self) -> frozenset[str]:
        """All that are read."""
        return frozenset((*(self.observations or [self.observation]), *(self.actions or [self.action])))


def observation_of(row: Mapping[str, Any], names: Names) -> np.ndarray:
    """Return what was observed: float64, (D,), (H, W) or (H, W, C).

    Raises:
        TaskError: it is missing, or no finite numbers in such a shape.
    """
    if names.observations:
        return np.array([_number(column_of(row, name, "observation_columns"), name) for name in names.observations])
    value = column_of(row, names.observation, "observation_column")
    return numbers(value, names.observation)


def numbers(value: Any, name: str) -> np.ndarray:
    """Return a number, or lists of them as deep as an image, as an array float64; a number is (1,).

    Raises:
        TaskError: it is something else, or not all are finite.
    """
    if isinstance(value, int | float | str | np.generic):
        return np.array([_number(value, name)])
    try:
        found = np.asarray(value)
    except ValueError:  # lists of several lengths
        found = np.empty(0, object)
    if found.dtype.kind not in "iufb" or not 1 <= found.ndim <= 3 or not found.size:
        raise TaskError(
            f"column {name!r} holds {value!r:.60}: an observation is a list of numbers, or an image as lists [H][W] or "
            "[H][W][C] of them"
        )
    found = found.astype(np.float64)
    if not np.isfinite(found).all():
        raise TaskError(f"column {name!r} holds {found[~np.isfinite(found)][0]}, which is no finite number")
    return found


def action_of(row: Mapping[str, Any], names: Names) -> str | np.ndarray:
    """Return what was done: a name, or numbers (A,) float64 if it is a list or several columns.

    Raises:
        TaskError: it is missing, or neither.
    """
    if names.actions:
        return np.array([_number(column_of(row, name, "action_columns"), name) for name in names.actions])
    value = column_of(row, names.action, "action_column")
    if isinstance(value, list | tuple | np.ndarray):
        found = numbers(value, names.action)
        if found.ndim != 1:
            raise TaskError(f"column {names.action!r} holds an action of shape {found.shape}; it is a list of numbers")
        return found
    if read(value, names.action).form == "missing":
        raise TaskError(f"column {names.action!r}, the action, is empty")
    return spelling(value)


def as_numbers(action: str | np.ndarray, name: str) -> np.ndarray:
    """Return an action as numbers (A,) float64.

    Raises:
        TaskError: it is a name.
    """
    return action if isinstance(action, np.ndarray) else np.array([_number(action, name)])


def _number(value: Any, name: str) -> float:
    cell = read(value, name)
    if cell.form != "number" or not math.isfinite(cell.number):
        raise TaskError(f"column {name!r} holds {value!r:.60}, which is no finite number")
    return cell.number


Shape = tuple[int, ...]


@dataclass(frozen=True)
class Range:
    """What the numbers of observations of one shape are."""

    low: float
    high: float
    whole: bool
    """Whether all are whole ones."""

    def merged(self, later: Range) -> Range:
        """Return the range of both."""
        return Range(min(self.low, later.low), max(self.high, later.high), self.whole and later.whole)


@dataclass(frozen=True)
class LogFindings:
    """What a log holds, out of one chunk or many."""

    shapes: Counter[Shape]
    """How many observations have each shape."""
    widths: Counter[int]
    """How many actions have so many numbers; 0 for single values."""
    ranges: Mapping[Shape, Range]
    forms: Counter[str]
    """What single actions are: whole, number, name."""
    labels: Tally
    """Single actions by their spelling."""
    sample: RowSample
    """Of some rows `observation D`, where it is a vector, and `action A`."""

    def merged(self, later: LogFindings) -> LogFindings:
        """Return the findings of both chunks."""
        both = self.ranges.keys() & later.ranges.keys()
        ranges = {**self.ranges, **later.ranges, **{at: self.ranges[at].merged(later.ranges[at]) for at in both}}
        return LogFindings(
            self.shapes + later.shapes,
            self.widths + later.widths,
            ranges,
            self.forms + later.forms,
            self.labels.plus(later.labels.counts),
            self.sample.merged(later.sample),
        )

    @property
    def shape(self) -> Shape:
        """The shape of most observations."""
        return max(self.shapes, key=lambda shape: (self.shapes[shape], shape))

    @property
    def width(self) -> int:
        """How many numbers most actions have; 0 where they are single values."""
        return max(self.widths, key=lambda width: (self.widths[width], width))

    @property
    def range(self) -> Range:
        """The range of the observations of that shape."""
        return self.ranges[self.shape]


def observed(rows: Sequence[Mapping[str, Any]], names: Names) -> LogFindings:
    """Count what a chunk of a log holds; rows of another shape than most are for `encode` to refuse."""
    seen = [(observation_of(row, names), action_of(row, names)) for row in rows]
    shapes = Counter(state.shape for state, _ in seen)
    single = [action for _, action in seen if isinstance(action, str)]
    return LogFindings(
        shapes,
        Counter(0 if isinstance(action, str) else action.size for _, action in seen),
        {shape: _range([state for state, _ in seen if state.shape == shape]) for shape in shapes},
        Counter(map(_form, single)),
        Tally(MOST_LABELS).plus(Counter(single)),
        _sample(seen),
    )


def _range(states: Sequence[np.ndarray]) -> Range:
    whole = np.stack(states)
    return Range(float(whole.min()), float(whole.max()), bool((whole % 1 == 0).all()))


def _sample(seen: Sequence[tuple[np.ndarray, str | np.ndarray]]) -> RowSample:
    """Draw rows, with a column of numbers for each size of vectors and of actions."""
    columns: dict[str, np.ndarray] = {}
    for at, (state, action) in enumerate(seen):
        acted = np.array([read(action, "action").number]) if isinstance(action, str) else action
        for name, value in (("observation", state), ("action", acted)):
            if value.ndim == 1:
                column = columns.setdefault(f"{name} {value.size}", np.full((len(seen), value.size), np.nan))
                column[at] = value
    keys = [(state.tobytes(), action if isinstance(action, str) else action.tobytes()) for state, action in seen]
    size = max((state.size for state, _ in seen if state.ndim == 1), default=1)
    return RowSample.of(keys, columns, max(1_000, min(20_000, VALUES // size)))


def _form(action: str) -> str:
    cell = read(action, "action")
    if cell.form != "number":
        return "name"
    return "whole" if cell.number % 1 == 0 else "number"


def kind_of_actions(found: LogFindings, wished: Literal["auto", "discrete", "continuous"]) -> tuple[Kind, str]:
    """Decide whether actions are chosen from a few, or are amounts; return that, and what is to be said.

    Raises:
        TaskError: what was wished for cannot be.
    """
    if found.width:
        if wished == "discrete":
            raise TaskError("task.kind is discrete, and the actions are lists of numbers")
        return "continuous", f"continuous actions: {found.width} numbers each"
    if found.forms["name"]:
        if wished == "continuous":
            raise TaskError("task.kind is continuous, and some actions are names, not numbers")
        return "discrete", ""
    if wished != "auto":
        return wished, ""
    few = found.labels.counts is not None and len(found.labels.counts) <= FEW
    if found.forms["number"] or not few:
        return "continuous", "continuous actions: one number each; task.kind: discrete takes them as names"
    return "discrete", "actions are few whole numbers, taken as names; task.kind: continuous takes them as amounts"
