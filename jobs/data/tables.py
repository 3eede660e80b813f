"""Raw examples out of tables: CSV, TSV, Parquet. As in jobs/data/readers.py, a bad row is an item too."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from jobs.data.compression import open_content
from jobs.data.examples import BadRow, Example, Rows, bounded
from jobs.data.readers import not_utf8

VERSION = 3
"""Raise it when a reader of this file makes something else of the same bytes: rows encoded before are not used."""
FIELD_CHARS = (1 << 31) - 1
"""Longest field of a CSV file; the csv module's own limit, 131,072, is shorter than a document."""
_SEPARATING = (";", "\t", "|", ",")
"""What separates columns in tables that were saved otherwise."""
SEPARATORS = {".csv": ",", ".tsv": "\t"}


def read_separated(separator: str, columns: Sequence[str] | None = None) -> Callable[[Path], Rows]:
    """Return what reads a table, its columns separated by `separator`; `columns` names those of one without header."""

    def read(path: Path) -> Rows:
        csv.field_size_limit(FIELD_CHARS)
        with open_content(path) as raw:
            # What is no UTF-8 becomes surrogates, so that the row they are in can be named, and the next one read.
            text = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="")
            records = _records(path, csv.reader(text, delimiter=separator, strict=True))
            names = list(columns) if columns else _header(path, records, separator)
            _refuse_twice(names, "data.columns" if columns else f"{path}:1")
            for where, values in records:
                if columns and _spoken(values) == _spoken(names):
                    raise UserError(f"{where}: the line is a header with the names of data.columns: leave those out")
                if isinstance(values, BadRow):
                    yield values
                    continue
                yield bounded(partial(_row, names, values, where, "data.columns" if columns else "the header"), where)

    return read


def _records(path: Path, reader: Any) -> Iterator[tuple[str, list[str] | BadRow]]:
    """Yield each record with the line where it begins; empty lines are passed over.

    Raises:
        UserError: a record of several lines is broken: from there on, nothing tells where one begins.
    """
    while True:
        begins = reader.line_num + 1
        where = f"{path}:{begins}"
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if reader.line_num > begins:
                raise UserError(f"{where}: {error}, in a record up to line {reader.line_num}") from None
            yield where, BadRow(where, str(error))
            continue
        if values:
            yield where, values


def _spoken(names: list[str] | BadRow) -> list[str]:
    """Return names as people compare them: without case and white space."""
    return [] if isinstance(names, BadRow) else [name.strip().casefold() for name in names]


def _header(path: Path, records: Iterator[tuple[str, list[str] | BadRow]], separator: str) -> list[str]:
    where, names = next(records, ("", []))
    if isinstance(names, BadRow):
        raise UserError(str(names))
    checked = bounded(lambda: [_text(name) for name in names], where)
    if isinstance(checked, BadRow):
        raise UserError(str(checked))
    marks = (mark for mark in _SEPARATING if mark != separator)  # the table's own one may stand in quotes
    other = next((mark for mark in marks if len(checked) == 1 and mark in checked[0]), None)
    if other is not None:
        kinds = " and ".join(f"{suffix} by {mark!r}" for suffix, mark in SEPARATORS.items())
        raise UserError(
            f"{where}: the header is one column, {checked[0]!r:.80}: its columns are separated by {other!r}; tables "
            f"are read as {kinds}: save it as one of these"
        )
    return checked


def _row(names: list[str], values: list[str], where: str, source: str) -> Example:
    if len(values) != len(names):
        raise UserError(f"the row has not the {len(names)} columns of {source}, it has {len(values)}")
    return Example({name: _text(value) for name, value in zip(names, values, strict=True)}, where)


def _text(value: str) -> str:
    if value.isascii():
        if "\0" in value:
            raise UserError("a NUL byte, which no text holds; convert the file")
        return value
    broken = next((c for c in value if "\udc80" <= c <= "\udcff"), None)
    if broken is not None:
        raise UserError(not_utf8(ord(broken) - 0xDC00))
    return value


def _refuse_twice(names: Sequence[str], where: str) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{where}: the column {twice[0]!r} is there twice; rename one of them")


def read_parquet(path: Path) -> Rows:
    """Read the rows of a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        _refuse_twice(file.schema_arrow.names, str(path))
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for row in _python_rows(batch):
                number += 1
                where = f"{path}: row {number}"
                yield bounded(partial(_example, row, where), where)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file: {error}") from error


def _python_rows(batch: Any) -> Iterator[Callable[[], dict[str, Any]]]:
    """Yield what makes each row: all at once, or one by one where a value of the batch cannot be made."""
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError):
        for index in range(batch.num_rows):
            yield partial(lambda i: batch.slice(i, 1).to_pylist()[0], index)
        return
    for row in rows:
        yield partial(dict, row)


def _example(make: Callable[[], dict[str, Any]], where: str) -> Example:
    return Example(make(), where)


READERS: dict[str, Callable[[Path], Rows]] = {".parquet": read_parquet}
