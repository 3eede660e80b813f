"""What is learned of the columns of a table: which are numbers, which are names, what is left out, and how each becomes
what a network reads. Pure.

Numbers are centred at their median and scaled by the distance of their quartiles, then softly held within ±3: robust
scaling and smooth clipping, after Holzmüller et al. 2024 (arXiv:2407.04491), so that one value far away changes little.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from jobs.tasks import TaskError
from jobs.tasks.cells import Cell, read, spelling
from jobs.tasks.labels import natural
from jobs.tasks.table_findings import ColumnFindings, TableFindings

Kind = Literal["number", "date", "category"]
MOSTLY = 0.9
"""From this share on, a column that holds numbers and texts is one of numbers, and the texts are mistakes."""
UNKNOWN, MISSING, FIRST = 0, 1, 2
"""Numbers of categories: one that training has not seen, none, and the first that has a name."""
NORMAL_IQR = 1.349
"""The distance of the quartiles of a normal distribution of deviation 1."""
HELD = 3.0
"""Scaled numbers are held within this."""
MOST_CATEGORIES = 1000
"""Of one column, where the options do not say."""
EXAMPLES = {"number": "numbers as 1234.5", "date": "dates as 2024-12-31"}
FAR = 1e9
"""Beyond this they are all alike."""


class OtherKind(TaskError):
    """A value that is neither missing nor of its column's kind."""


@dataclass(frozen=True)
class Column:
    """One column that the network reads."""

    name: str
    kind: Kind
    missing: bool = False
    """Whether it was ever empty in training."""
    lacking: bool = False
    """Whether rows in training had no such column at all."""
    centre: float = 0.0
    scale: float = 1.0
    categories: tuple[str, ...] = ()

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Column:
        """Return the column that `asdict` made JSON of."""
        return cls(**{**given, "categories": tuple(given["categories"])})

    def as_json(self) -> dict[str, Any]:
        """Return what `of` reads back."""
        return {**asdict(self), "categories": list(self.categories)}

    @property
    def cardinality(self) -> int:
        """How many numbers stand for its categories, with those for unknown and missing."""
        return len(self.categories) + FIRST

    def cell(self, row: Mapping[str, Any]) -> Cell:
        """Read the cell of a row.

        Raises:
            TaskError: the row has no such column and training always had it, or it holds what is none of its values.
        """
        if self.name not in row and not self.lacking:
            raise TaskError(f"no column {self.name!r}, which all rows in training had; this row has {sorted(row)}")
        cell = read(row.get(self.name), self.name)
        if self.kind == "category":
            return cell
        if cell.form in ("missing", "marked") or (cell.form == self.kind and math.isfinite(cell.number)):
            return cell
        held = f"column {self.name!r} holds {row[self.name]!r:.60}"
        if cell.form == "number" and self.kind == "number":
            raise TaskError(f"{held}, which is no finite number")
        raise OtherKind(f"{held}, and it is one of {EXAMPLES[self.kind]}")

    def scaled(self, cells: Sequence[Cell]) -> tuple[np.ndarray, np.ndarray]:
        """Return the numbers as a network reads them, 0 where there is none, (N,) float32, and where, (N,) uint8."""
        raw = np.array([cell.number for cell in cells])
        gone = np.isnan(raw)
        far = np.clip(np.where(gone, 0.0, raw - self.centre) * self.scale, -FAR, FAR)
        return (far / np.sqrt(1 + (far / HELD) ** 2)).astype(np.float32), gone.astype(np.uint8)

    def numbered(self, rows: Sequence[Mapping[str, Any]], cells: Sequence[Cell]) -> np.ndarray:
        """Return the numbers of the categories, (N,) int32."""
        index = {name: FIRST + i for i, name in enumerate(self.categories)}
        none = MISSING if self.missing else UNKNOWN
        found = (
            none if cell.form == "missing" else index.get(spelling(row[self.name]), UNKNOWN)
            for row, cell in zip(rows, cells, strict=True)
        )
        return np.fromiter(found, np.int32, len(cells))


@dataclass(frozen=True)
class Wishes:
    """What the user says of the columns."""

    target: str
    categorical: tuple[str, ...] = ()
    numeric: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    max_categories: int = MOST_CATEGORIES


def chosen(findings: TableFindings, wishes: Wishes) -> tuple[list[Column], list[str]]:
    """Decide what becomes of each column but the target.

    Returns:
        The columns that are read, in the order of the data; sentences for the log.

    Raises:
        TaskError: a wish names no column, or a column cannot be read one way or the other, or none is left.
    """
    _check_names(findings, wishes)
    columns: list[Column] = []
    said: list[str] = []
    for name, found in findings.columns.items():
        if name == wishes.target:
            continue
        kind, note = _kind(name, found, wishes)
        said += [note] if note else []
        if kind is not None:
            column, notes = _learned(name, kind, found, findings, wishes)
            columns.append(column)
            said += notes
    if not columns:
        raise TaskError(f"no column is left to learn from: {'; '.join(said) or 'the target stands alone'}")
    return columns, [_summary(columns), *said]


def check_kept(columns: Sequence[Column], wishes: Wishes) -> None:
    """Raise TaskError for a wish that the columns of the model that the job starts from do not honour."""
    kinds = {column.name: column.kind for column in columns}
    if wishes.target in kinds:
        raise TaskError(
            f"task.target_column is {wishes.target!r}, which the model it starts from reads: it would be told the "
            "answer; train a fresh model for it"
        )
    for name in wishes.ignore:
        if name in kinds:
            raise TaskError(
                f"task.ignore names {name!r}, which the model it starts from reads: leave it out there, or train a "
                "fresh model"
            )
    told = max((len(column.categories) for column in columns), default=0)
    if wishes.max_categories != MOST_CATEGORIES and told > wishes.max_categories:
        raise TaskError(
            f"task.max_categories is {wishes.max_categories}, and the model it starts from tells {told} of a column "
            "apart: leave it out, or train a fresh model"
        )
    asked = [(name, "categorical", "category") for name in wishes.categorical]
    for name, option, kind in [*asked, *((name, "numeric", "number") for name in wishes.numeric)]:
        if kinds.get(name) != kind:
            held = f"reads as a {kinds[name]}" if name in kinds else "does not read"
            raise TaskError(
                f"task.{option} names {name!r}, which the model it starts from {held}: leave it out there, or train a "
                "fresh model"
            )


def target_column(findings: TableFindings, name: str) -> ColumnFindings:
    """Return what the target's column holds.

    Raises:
        TaskError: there is none; the message names those that are there.
    """
    if name in findings.columns:
        return findings.columns[name]
    raise TaskError(f"no column {name!r} (task.target_column); there are {', '.join(findings.columns)}")


def _check_names(findings: TableFindings, wishes: Wishes) -> None:
    known = {*findings.columns, *findings.ignored}
    for option in ("categorical", "numeric", "ignore"):
        for name in getattr(wishes, option):
            if name not in known:
                raise TaskError(f"task.{option} names {name!r}, and there are {', '.join(findings.columns)}")


def _kind(name: str, found: ColumnFindings, wishes: Wishes) -> tuple[Kind | None, str]:
    """Return what a column is, None where it is left out, and what is to be said of that."""
    if not found.present or (not found.number_of("number", "flag", "date", "text") and name not in wishes.categorical):
        return None, f"column {name!r} is left out: it is empty in every row"
    if name in wishes.numeric:
        return "number", ""
    if name in wishes.categorical:
        return "category", ""
    valued = found.number_of("number", "flag", "date", "text")
    if found.forms["number"] >= MOSTLY * valued:
        return _of_numbers(name, found)
    if found.forms["date"] == valued:
        return "date", f"column {name!r} holds dates: they become days since 1970{_said_of_zones(found)}"
    return _of_names(name, found)


def _said_of_zones(found: ColumnFindings) -> str:
    naive = found.forms["date"] - found.zoned
    if not (naive and found.zoned):
        return ""
    return f"; {naive} of {found.forms['date']} name no time zone, as the others do, and are taken as UTC"


def _of_numbers(name: str, found: ColumnFindings) -> tuple[Kind | None, str]:
    counts = found.numbers.counts
    if counts is not None and len(counts) == 1 and not found.number_of("missing", "marked"):
        return None, f"column {name!r} is left out: it is {next(iter(counts))} in every row"
    marked = found.forms["marked"]
    said = f"column {name!r}: {marked} texts such as NA are taken as missing" if marked else ""
    if counts is not None and _is_sequence(counts, found):
        said = f"column {name!r} counts the rows; if it is a name, leave it out with task.ignore"
    return "number", said


def _is_sequence(counts: Mapping[str, int], found: ColumnFindings) -> bool:
    """Tell whether whole numbers follow each other without gap or repeat, as row numbers do."""
    if found.whole != found.forms["number"] or len(counts) != found.whole or len(counts) < 20:
        return False
    values = [float(value) for value in counts]
    return max(values) - min(values) == len(values) - 1


def _of_names(name: str, found: ColumnFindings) -> tuple[Kind | None, str]:
    counts = _names(found)
    many = "more than can be counted" if counts is None else f"{len(counts)} different ones in {found.present} rows"
    if found.adorned > found.present / 2:
        raise TaskError(
            f"column {name!r} holds numbers with separators or units, such as 1,234 or 5 %, which cannot be read as "
            "numbers: write them as 1234.5, or take them as names with task.categorical, or leave them out with "
            "task.ignore"
        )
    if counts is None or (len(counts) == found.present and found.present > 1):
        return None, (
            f"column {name!r} is left out: its texts are names of rows, or prose ({many}); task.categorical takes them "
            "as categories nevertheless"
        )
    if len(counts) == 1 and not found.forms["missing"]:
        return None, f"column {name!r} is left out: it is {next(iter(counts))!r:.40} in every row"
    if found.forms["number"]:
        mixed = f"column {name!r} holds {found.forms['number']} numbers among {found.present} values"
        return "category", f"{mixed}: all are taken as names; task.numeric refuses what is no number instead"
    return "category", ""


def _names(found: ColumnFindings) -> dict[str, int] | None:
    """Return how often each value occurs, numbers too; None where they are too many."""
    if found.names.counts is None or (found.numbers.counts is None and found.forms["number"]):
        return None
    return dict(found.names.counts + (found.numbers.counts or type(found.names.counts)()))


def _learned(
    name: str, kind: Kind, found: ColumnFindings, findings: TableFindings, wishes: Wishes
) -> tuple[Column, list[str]]:
    lacking = found.lacking > 0
    if kind != "category":
        centre, scale = scaling(findings.sample[name])
        return Column(name, kind, found.number_of("missing", "marked") > 0, lacking, centre, scale), []
    counts = _names(found)
    if counts is None:
        raise TaskError(f"column {name!r} has too many different values to be one of categories; see task.ignore")
    by_frequency = sorted(counts, key=lambda value: (-counts[value], natural(value)))
    kept, rest = by_frequency[: wishes.max_categories], by_frequency[wishes.max_categories :]
    said = []
    if rest:
        rows = sum(counts[value] for value in rest)
        said = [
            f"column {name!r} has {len(counts)} categories: the {len(kept)} most frequent are told apart, and the "
            f"others, in {rows} rows, are one (task.max_categories)"
        ]
    categories = tuple(sorted(kept, key=natural))
    return Column(name, kind, found.forms["missing"] > 0, lacking, categories=categories), said


def scaling(values: np.ndarray) -> tuple[float, float]:
    """Return the centre and the scale of numbers (n,) float64: median, and 1 for the deviation of a normal one."""
    if not len(values):
        return 0.0, 1.0
    low, centre, high = np.quantile(values, [0.25, 0.5, 0.75])
    if high > low:
        return float(centre), float(NORMAL_IQR / (high - low))
    spread = values.max() - values.min()
    return float(centre), float(2 / spread) if spread > 0 else 1.0


def _summary(columns: Sequence[Column]) -> str:
    kinds: dict[str, list[str]] = {"number": [], "date": [], "category": []}
    for column in columns:
        kinds[column.kind].append(column.name)
    return f"columns: {'; '.join(_counted(kind, names) for kind, names in kinds.items() if names)}"


def _counted(kind: str, names: Iterable[str]) -> str:
    names = list(names)
    plural = {"number": "numbers", "date": "dates", "category": "categories"}[kind]
    return f"{len(names)} of {plural} ({', '.join(names[:8])}{', …' if len(names) > 8 else ''})"
