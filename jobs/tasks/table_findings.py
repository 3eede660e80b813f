"""What the columns of a table hold, counted over chunks of its rows. Adds up to the same wherever chunks are cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jobs.tasks.cells import Form, is_adorned, is_zoned, read, spelling
from jobs.tasks.row_sample import RowSample

MOST_NAMES = 50_000
"""Different names of a column that are counted; a column with more is none of categories."""
MOST_NUMBERS = 1_000
"""The same of numbers, unless the column is said to be categorical."""


@dataclass(frozen=True)
class Tally:
    """How often each value occurs; None where there are more different ones than `most`."""

    most: int
    counts: Counter[str] | None = field(default_factory=Counter)

    def plus(self, values: Mapping[str, int] | None) -> Tally:
        """Return the tally with more values; once there are too many, there always are."""
        if self.counts is None or values is None:
            return Tally(self.most, None)
        counts = self.counts + Counter(values)
        return Tally(self.most, counts if len(counts) <= self.most else None)


@dataclass(frozen=True)
class ColumnFindings:
    """What one column holds."""

    forms: Counter[Form]
    """How many cells are of each form; a row without the column counts as `missing`."""
    whole: int
    """Numbers without a fraction."""
    adorned: int
    """Texts that are numbers with separators or units."""
    names: Tally
    """Texts, dates, true and false, by their spelling."""
    numbers: Tally
    """Numbers by their spelling."""
    lacking: int = 0
    """Rows that have no such column at all."""
    zoned: int = 0
    """Dates that name a time zone."""

    def merged(self, later: ColumnFindings) -> ColumnFindings:
        """Return the findings of both chunks."""
        return ColumnFindings(
            self.forms + later.forms,
            self.whole + later.whole,
            self.adorned + later.adorned,
            self.names.plus(later.names.counts),
            self.numbers.plus(later.numbers.counts),
            self.lacking + later.lacking,
            self.zoned + later.zoned,
        )

    def number_of(self, *forms: Form) -> int:
        """Return how many cells are of these forms."""
        return sum(self.forms[form] for form in forms)

    @property
    def present(self) -> int:
        """How many cells hold something."""
        return sum(self.forms.values()) - self.forms["missing"]


@dataclass(frozen=True)
class TableFindings:
    """What a table holds, out of one chunk or many."""

    rows: int
    columns: Mapping[str, ColumnFindings]
    """In the order in which they are first met."""
    sample: RowSample
    """Of each column the numbers, and dates as days since 1970."""
    ignored: frozenset[str] = frozenset()
    """Columns that are there and left out by choice."""

    def merged(self, later: TableFindings) -> TableFindings:
        """Return the findings of both chunks."""
        names = {**self.columns, **later.columns}
        columns = {name: _column(self, name, names).merged(_column(later, name, names)) for name in names}
        ignored = self.ignored | later.ignored
        return TableFindings(self.rows + later.rows, columns, self.sample.merged(later.sample), ignored)


def observed(rows: Sequence[Mapping[str, Any]], ignored: Set[str], named: Set[str]) -> TableFindings:
    """Count what a chunk of rows holds.

    Args:
        ignored: columns that are left out by choice.
        named: columns that are categorical by choice, so that all their numbers are names.
    """
    names = [name for name in dict.fromkeys(key for row in rows for key in row) if name not in ignored]
    columns, numbers = {}, {}
    for name in names:
        columns[name], numbers[name] = _observed(rows, name, name in named)
    kept = [[row.get(name) for name in names] for row in rows]
    there = frozenset(name for name in ignored if any(name in row for row in rows))
    return TableFindings(len(rows), columns, RowSample.of(kept, numbers), there)


def _observed(rows: Sequence[Mapping[str, Any]], name: str, named: bool) -> tuple[ColumnFindings, np.ndarray]:
    """Return what one column holds, and its numbers (N,), NaN where there is none or an infinite one."""
    cells = [read(row.get(name), name) for row in rows]
    forms: Counter[Form] = Counter(cell.form for cell in cells)
    numbers = np.array([cell.number for cell in cells])
    numbers[~np.isfinite(numbers)] = np.nan
    present = [(row[name], cell) for row, cell in zip(rows, cells, strict=True) if cell.form != "missing"]
    found = ColumnFindings(
        forms,
        whole=sum(cell.form == "number" and cell.number % 1 == 0 for _, cell in present),
        adorned=sum(cell.form == "text" and is_adorned(value) for value, cell in present),
        names=Tally(MOST_NAMES).plus(Counter(spelling(value) for value, cell in present if cell.form != "number")),
        numbers=Tally(MOST_NAMES if named else MOST_NUMBERS).plus(
            Counter(spelling(value) for value, cell in present if cell.form == "number")
        ),
        lacking=sum(name not in row for row in rows),
        zoned=sum(cell.form == "date" and is_zoned(value) for value, cell in present),
    )
    return found, numbers


def _column(findings: TableFindings, name: str, names: Mapping[str, ColumnFindings]) -> ColumnFindings:
    """Return what is known of a column; where no row of a chunk has it, that all lack it."""
    if name in findings.columns:
        return findings.columns[name]
    lacking: Counter[Form] = Counter({"missing": findings.rows} if findings.rows else {})
    like = names[name]
    return ColumnFindings(lacking, 0, 0, Tally(like.names.most), Tally(like.numbers.most), findings.rows)
