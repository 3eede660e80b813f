"""Raw examples out of tables: CSV, TSV, Parquet. As in jobs/data/readers.py, a bad row is an item too."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from cluster.errors import UserError
from jobs.data.classes import class_columns, features_of, unlabelled
from jobs.data.compression import open_content
from jobs.data.examples import BadRow, Cut, Example, Rows, bounded, unread
from jobs.data.readers import not_utf8
from jobs.data.remote import Place

VERSION = 4
"""Raise it when a reader of this file makes something else of the same bytes: rows encoded before are not used."""
FIELD_CHARS = (1 << 31) - 1
"""Longest field of a CSV file; the csv module's own limit, 131,072, is shorter than a document."""
_SEPARATING = (";", "\t", "|", ",")
"""What separates columns in tables that were saved otherwise."""
SEPARATORS = {".csv": ",", ".tsv": "\t"}
_UNQUOTED = 'where a " is a character of the text and quotes nothing, say so with data.quotes: false'


@dataclass(frozen=True)
class TableForm:
    """What CSV and TSV files do not say of themselves."""

    columns: Sequence[str] | None = None
    """The names of the columns of a table without header line."""
    quotes: bool = True
    """A field may stand in quotes; False: a quote is a character like others."""


PLAIN = TableForm()


def check_used(form: TableForm, tables: bool) -> None:
    """Refuse to be told what tables do not say of themselves, where the data has none.

    Args:
        tables: whether it has.

    Raises:
        UserError: names the key.
    """
    if form != PLAIN and not tables:
        key = "columns" if form.columns else "quotes"
        raise UserError(f"data.{key} is for CSV and TSV files, and there is none: leave it out")


def read_separated(separator: str, form: TableForm) -> Callable[[Place], Rows]:
    """Return what reads a table, its columns separated by `separator`; any process can be sent it."""
    return partial(_read_table, separator, form)


def _read_table(separator: str, form: TableForm, path: Place) -> Rows:
    columns = form.columns
    csv.field_size_limit(FIELD_CHARS)
    with open_content(path) as raw:
        # What is no UTF-8 becomes surrogates, so that the row they are in can be named, and the next one read.
        text = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="")
        lines = _Lines(text)
        records = _records(path, csv.reader(lines, delimiter=separator, strict=True, quoting=_quoting(form)), lines)
        names = _unique(list(columns), "data.columns: ") if columns else _header(records, separator)
        if isinstance(names, BadRow):
            yield names
            return
        for where, values in records:
            if columns and _spoken(values) == _spoken(names):
                raise UserError(f"{where}: the line is a header with the names of data.columns: leave those out")
            if isinstance(values, BadRow):
                yield values
                continue
            yield bounded(partial(_row, names, values, where, "data.columns" if columns else "the header"), where)


def _quoting(form: TableForm) -> Literal[0, 3]:
    return csv.QUOTE_MINIMAL if form.quotes else csv.QUOTE_NONE


class _Lines:
    """Passes lines on, without a byte order mark before a record, and keeps those of the one that is being read."""

    def __init__(self, lines: Iterable[str]) -> None:
        self._lines = iter(lines)
        self.taken: list[str] = []

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        if not self.taken:  # files with byte order marks were joined
            line = line.removeprefix("\ufeff")
        self.taken.append(line)
        return line


def _records(path: Place, reader: Any, lines: _Lines) -> Iterator[tuple[str, list[str] | BadRow]]:
    """Yield each record with the line where it begins; empty lines are passed over.

    Raises:
        UserError: a record of several lines is broken, so that from there on nothing tells where one begins; or its
            lines are rows, whose quotes were no quotes.
    """
    separator: str = reader.dialect.delimiter
    while True:
        lines.taken.clear()
        begins = reader.line_num + 1
        where = f"{path}:{begins}"
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if reader.line_num > begins:
                raise UserError(f"{where}: {error}, in a record up to line {reader.line_num}; {_UNQUOTED}") from None
            yield where, BadRow(where, f"{error}; {_UNQUOTED}" if "expected after" in str(error) else str(error))
            continue
        if len(lines.taken) > 1 and are_rows(lines.taken, separator, len(values)):
            raise UserError(
                f"{where}: by its quotes a field goes on to line {reader.line_num}, over {len(lines.taken)} lines of "
                f"which each has the {len(values)} columns of a row; {_UNQUOTED}"
            )
        if values:
            yield where, values


def are_rows(lines: Sequence[str], separator: str, columns: int) -> bool:
    """Tell whether each line that a quoted field joins would be a row of so many columns by itself."""
    return columns > 1 and all(line.count(separator) == columns - 1 for line in lines)


def _spoken(names: list[str] | BadRow) -> list[str]:
    """Return names as people compare them: without case and white space."""
    return [] if isinstance(names, BadRow) else [name.strip().casefold() for name in names]


def _header(records: Iterator[tuple[str, list[str] | BadRow]], separator: str) -> list[str] | BadRow:
    """Return the names of the columns; where these cannot be read, what the whole table is then."""
    where, names = next(records, ("", []))
    read = names if isinstance(names, BadRow) else bounded(partial(_names, names, separator), where)
    return unread(where, read.reason) if isinstance(read, BadRow) else read


def _names(header: list[str], separator: str) -> list[str]:
    names = [_text(name) for name in header]
    marks = (mark for mark in _SEPARATING if mark != separator)  # the table's own one may stand in quotes
    other = next((mark for mark in marks if len(names) == 1 and mark in names[0]), None)
    if other is not None:
        kinds = " and ".join(f"{suffix} by {mark!r}" for suffix, mark in SEPARATORS.items())
        raise UserError(
            f"the header is one column, {names[0]!r:.80}: its columns are separated by {other!r}; tables are read as "
            f"{kinds}: save it as one of these"
        )
    return _unique(names)


def _row(names: list[str], values: list[str], where: str, source: str) -> Example:
    if len(values) > 1 and values == names:
        raise UserError(f"the line is {source} once more: files were joined")
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


def _unique(names: list[str], where: str = "") -> list[str]:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{where}the column {twice[0]!r} is there twice; rename one of them")
    return names


def read_parquet(path: Place, cut: Cut | None = None) -> Rows:
    """Read the rows of a Parquet file, or of some of its row groups.

    Raises:
        UserError: it breaks off behind a row that can be read, or one of several parts is broken.
    """
    import pyarrow
    import pyarrow.parquet

    number = cut.before if cut else 0
    opened = path if isinstance(path, Path) else path.native()
    try:
        file = pyarrow.parquet.ParquetFile(opened, page_checksum_verification=True)
        _unique(file.schema_arrow.names)
        classes = class_columns(features_of(file.schema_arrow.metadata))
        groups = range(cut.start, cut.end) if cut else None
        for batch in file.iter_batches(batch_size=1024, row_groups=groups):
            for row in _python_rows(batch):
                number += 1
                where = f"{path}: row {number}"
                yield bounded(partial(_example, row, classes, where), where)
    except UserError as error:
        yield unread(str(path), str(error))
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: a column's name is no UTF-8
        if number or cut or not isinstance(path, Path):  # a store that does not answer is no bad row
            raise UserError(f"{path}: broken behind row {number}: {error}") from error
        yield unread(str(path), f"not a readable Parquet file: {error}")


def parquet_cuts(path: Place, size: int) -> tuple[Cut, ...]:
    """Cut a Parquet file between row groups, into parts of at least `size` bytes; none where it cannot be read."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path if isinstance(path, Path) else path.native())
        _unique(file.schema_arrow.names)
    except (UserError, pyarrow.ArrowException, OSError, ValueError):
        return ()  # reading it says so
    cuts, start, before, rows, bytes_ = list[Cut](), 0, 0, 0, 0
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        rows, bytes_ = rows + group.num_rows, bytes_ + group.total_byte_size
        if bytes_ >= size or number == file.metadata.num_row_groups - 1:
            cuts.append(Cut(start, number + 1, before, bytes_))
            start, before, rows, bytes_ = number + 1, before + rows, 0, 0
    return tuple(cuts)


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


def _example(make: Callable[[], dict[str, Any]], classes: Set[str], where: str) -> Example:
    return Example(unlabelled(make(), classes), where, padded=True)


READERS: dict[str, Callable[[Place], Rows]] = {".parquet": read_parquet}
