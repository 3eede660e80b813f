"""Raw examples out of one file: text, JSON lines, JSON, CSV, TSV, Parquet. A bad row is an item too, not the end.

A row that cannot be read comes as `BadRow`, with file and line; whether it ends the job or is left out is for
jobs/data/sources.py to say. A file that cannot be read at all is a UserError.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from cluster.errors import UserError
from jobs.data.examples import BadRow, Example, Rows

TEXT_SUFFIXES = {".txt", ".md", ".rst", ".py", ".text"}


def read_text(path: Path) -> Rows:
    """Read a file as one example, `text`."""
    content = path.read_bytes()
    try:
        yield Example({"text": content.decode("utf-8-sig")}, str(path))
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        yield BadRow(f"{path}:{line}", f"byte 0x{content[error.start]:02x} is not UTF-8; convert the file")


def read_json_lines(path: Path) -> Rows:
    """Read one object a line; empty lines and a byte order mark are passed over."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _json_line(line, f"{path}:{number}")


def _json_line(line: bytes, where: str) -> Example | BadRow:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return BadRow(where, f"byte 0x{line[error.start]:02x} is not UTF-8; convert the file")
    except json.JSONDecodeError as error:
        return BadRow(where, f"not valid JSON: {error.msg} (column {error.colno})")
    except RecursionError:
        return BadRow(where, "nested too deeply")
    if not isinstance(value, dict):
        return BadRow(where, f"a line holds one object, this is a {type(value).__name__}")
    return Example(value, where)


def read_json(path: Path) -> Rows:
    """Read a list of objects."""
    try:
        values = json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; convert the file") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    if not isinstance(values, list):
        raise UserError(f"{path}: expected a list of objects; one object a line is .jsonl")
    for number, value in enumerate(values):
        where = f"{path}[{number}]"
        yield Example(value, where) if isinstance(value, dict) else BadRow(where, "not an object")


def read_separated(separator: str, columns: Sequence[str] | None = None) -> Callable[[Path], Rows]:
    """Return what reads a table, its columns separated by `separator`; `columns` names those of one without header."""

    source = "data.columns" if columns else "the header"

    def read(path: Path) -> Rows:
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                rows = csv.DictReader(file, columns, delimiter=separator, strict=True)
                for row in rows:
                    where, width = f"{path}:{rows.line_num}", len(rows.fieldnames or [])
                    if None in row or None in row.values():
                        yield BadRow(where, f"the row has not the {width} columns of {source}")
                    else:
                        yield Example(dict(row), where)
        except UnicodeDecodeError as error:
            raise UserError(f"{path}:{_line_of(path, error)}: {_not_utf8(error)}") from None
        except csv.Error as error:  # from here on, nothing tells where a row begins
            raise UserError(f"{path}:{rows.line_num}: {error}") from None

    return read


def _line_of(path: Path, error: UnicodeDecodeError) -> int:
    """Return the line of the first byte that is not UTF-8; a buffered reader's own position says nothing."""
    content = path.read_bytes()
    try:
        content.decode("utf-8-sig")
    except UnicodeDecodeError as found:
        return content[: found.start].count(b"\n") + 1
    return 1


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"byte 0x{error.object[error.start]:02x} is not UTF-8; convert the file"


def read_parquet(path: Path) -> Rows:
    """Read the rows of a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield Example(row, f"{path}: row {number}")
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file: {error}") from error


SEPARATORS = {".csv": ",", ".tsv": "\t"}

READERS: dict[str, Callable[[Path], Rows]] = {
    **dict.fromkeys(TEXT_SUFFIXES, read_text),
    ".jsonl": read_json_lines,
    ".json": read_json,
    **{suffix: read_separated(separator) for suffix, separator in SEPARATORS.items()},
    ".parquet": read_parquet,
}
