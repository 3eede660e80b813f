"""The rows of `data.predict`, numbered from 0 in the order in which they are read: surveyed once, then cut into shards.

A row that cannot be read is a row too: what comes out has one row for each that goes in. Rows are streamed; a few
shards of them are in memory at a time. Of a task that gathers rows (jobs/data/grouping.py) each group is one row here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from cluster.errors import UserError
from jobs.data.examples import BadRow, BadRows, Example, Source, bounded, kind_of
from jobs.data.grouping import grouped
from jobs.data.stream import CHUNK_BYTES, size_of
from jobs.predict.columns import KeptColumns
from jobs.tasks import Task

Row = Example | BadRow
LEARNED_AT_ONCE = 1024
"""Rows whose columns are looked at together."""


@dataclass(frozen=True)
class Shard:
    """Rows that one worker works off as one."""

    number: int
    first: int
    """The number of its first row."""
    rows: Sequence[Row]
    digest: str
    """SHA-256 (hex) of its rows."""


@dataclass(frozen=True)
class Survey:
    """What the first reading of the input says."""

    rows: int
    digest: str
    """SHA-256 (hex) of all rows in their order, and of the files that they name."""
    unwritable: Mapping[int, BadRow]
    """Rows whose columns cannot be written, by number."""
    bad: Mapping[int, BadRow]
    """All rows that cannot be used: these, those that cannot be read, and those that the task takes no instance of."""
    columns: KeptColumns
    shards: int
    """How many shards the rows come to."""


class Tolerance:
    """How many bad rows a job puts up with: none, or so many."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.bad: dict[int, BadRow] = {}

    def add(self, number: int, row: BadRow) -> None:
        """Count a row, unless it is counted.

        Raises:
            UserError: it is one too many.
        """
        if not self._most:
            raise UserError(f"{row}; with data.bad_rows: skip it would be in the output with this error")
        self.bad[number] = row
        if len(self.bad) > self._most:
            raise UserError(f"{row}; it is bad row number {len(self.bad)}, and data.max_bad_rows is {self._most}")

    def said(self, rows: int) -> list[str]:
        """Say how many of the rows have an error, and one of each kind; most first."""
        kinds: dict[str, list[BadRow]] = {}
        for _, row in sorted(self.bad.items()):
            kinds.setdefault(kind_of(row.reason), []).append(row)
        ordered = sorted(kinds.values(), key=lambda group: -len(group))[: BadRows.KEPT]
        return [
            f"{len(group)} of {rows} rows have an error instead of a prediction, as {group[0]}" for group in ordered
        ]


def rows_of(source: Source, task: Task) -> Iterator[Row]:
    """Read the rows one by one; of a task that gathers them, the examples that they make, and then the bad ones."""
    every = (row for part in source.singles for row in part.read())
    grouping = task.grouping()
    if grouping is None:
        yield from every
        return
    kept = _Kept()
    yield from grouped(every, grouping, task.check, kept, whole=True)
    yield from kept.rows


class _Kept(BadRows):
    """Keeps bad rows instead of judging them."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[BadRow] = []

    def add(self, row: BadRow) -> None:
        self.rows.append(row)


def survey(source: Source, task: Task, columns: KeptColumns, tolerance: Tolerance, most_rows: int) -> Survey:
    """Read all rows once: count and digest them, learn the types of their columns, find those that cannot be used.

    Args:
        columns: learns; it is the survey's afterwards.
        most_rows: of a shard.

    Raises:
        UserError: there is one bad row too many, no row at all or none that can be used, or a column cannot be written.
    """
    digest, count, unwritable, cutter = hashlib.sha256(), 0, dict[int, BadRow](), _Cutter(most_rows)
    waiting: list[tuple[int, Example]] = []

    def learn() -> None:
        for at, reason in columns.learn([row for _, row in waiting]).items():
            number, row = waiting[at]
            unwritable[number] = BadRow(row.where, reason)
            tolerance.add(number, unwritable[number])
        waiting.clear()

    for number, row in enumerate(rows_of(source, task)):
        digest.update(_digest(row, task))
        count += 1
        cutter.ends_with(row)
        usable = row if isinstance(row, BadRow) else bounded(partial(task.instance, row), row.where)
        if isinstance(usable, BadRow):
            tolerance.add(number, usable)
        if isinstance(row, Example):
            waiting.append((number, row))
        if len(waiting) == LEARNED_AT_ONCE:
            learn()
    learn()
    if not count:
        raise UserError(f"data: {source.name} holds no row{''.join(f'; {note}' for note in source.notes)}")
    if len(tolerance.bad) == count:
        raise UserError(
            f"data: {source.name}: none of its {count} rows can be used; {tolerance.bad[min(tolerance.bad)]}"
        )
    return Survey(count, digest.hexdigest(), unwritable, dict(tolerance.bad), columns, cutter.shards)


def shards(source: Source, task: Task, found: Survey, most_rows: int) -> Iterator[Shard]:
    """Cut the rows into shards, of `most_rows` or CHUNK_BYTES: where depends on nothing but the rows.

    Raises:
        UserError: the rows are not those of the survey any more.
    """
    whole, number, first, cutter = hashlib.sha256(), 0, 0, _Cutter(most_rows)
    rows: list[Row] = []
    digests: list[bytes] = []

    def cut() -> Shard:
        return Shard(number, first, tuple(rows), hashlib.sha256(b"".join(digests)).hexdigest())

    for at, read in enumerate(rows_of(source, task)):
        digests.append(_digest(read, task))
        whole.update(digests[-1])
        rows.append(found.unwritable.get(at, read))
        if cutter.ends_with(read):
            yield cut()
            number, first = number + 1, at + 1
            rows.clear()
            digests.clear()
    if rows:
        yield cut()
    if whole.hexdigest() != found.digest:
        raise UserError(f"data: {source.name} has changed while it was read; submit the job again")


class _Cutter:
    """Says where shards end: after so many rows, or CHUNK_BYTES."""

    def __init__(self, most_rows: int) -> None:
        self._most, self._rows, self._size = most_rows, 0, 0
        self.shards = 0

    def ends_with(self, row: Row) -> bool:
        """Take the next row; return whether it is the last of its shard."""
        self.shards += self._rows == 0
        self._rows += 1
        self._size += size_of(row) if isinstance(row, Example) else 0
        full = self._rows == self._most or self._size >= CHUNK_BYTES
        if full:
            self._rows = self._size = 0
        return full


def _digest(row: Row, task: Task) -> bytes:
    """Return the SHA-256 of a row, and of the files that it names."""
    digest = hashlib.sha256()
    if isinstance(row, BadRow):
        _add(digest, [row.where, row.reason])
        return digest.digest()
    _add(digest, row)
    paths = () if type(task).files is Task.files else bounded(partial(task.files, row), row.where)
    for path in () if isinstance(paths, BadRow) else paths:
        _add(digest, path.read_bytes() if path.is_file() else None)
    return digest.digest()


def _add(digest: Any, value: Any) -> None:
    """Add a value, its kind and its length, so that no two values give the same bytes."""
    if isinstance(value, str):
        kind, content = "s", value.encode("utf-8", "surrogatepass")
    elif isinstance(value, dict):
        digest.update(f"m{len(value)};".encode())
        for key, inner in value.items():
            _add(digest, key)
            _add(digest, inner)
        return
    elif isinstance(value, list | tuple):
        digest.update(f"l{len(value)};".encode())
        for inner in value:
            _add(digest, inner)
        return
    elif isinstance(value, bytes):
        kind, content = "b", value
    elif isinstance(value, np.ndarray) and value.dtype != object:
        kind, content = f"a{value.dtype}{value.shape}", np.ascontiguousarray(value).tobytes()
    elif isinstance(value, np.ndarray):
        return _add(digest, value.tolist())
    elif hasattr(value, "tobytes"):  # an image that is open
        kind, content = type(value).__name__, value.tobytes()
    else:
        kind, content = type(value).__name__, repr(value).encode("utf-8", "surrogatepass")
    digest.update(f"{kind}{len(content)};".encode() + content)
