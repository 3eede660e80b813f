"""What is done of a prediction: a file for each shard, and a line about it, written last.

    parts/00012-3f9c.parquet    the rows of a shard, whole: written under another name, then renamed
    parts/done.jsonl            one line a shard (Entry): which file it is, and what proves it

Workers write files, each under a name of its own; the driver alone, which owns the run, writes the lines. So a worker
of before that still writes changes nothing that counts. Where the storage is an object store, the files are there, in
runs/<key>/shards/, and the lines are a note of the run.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cluster import stores
from cluster.errors import UserError
from jobs import notes
from jobs.data.examples import BadRow, printable
from jobs.predict import places
from jobs.predict.columns import ERROR, ONLY_JSON, WHERE, arrow, json_line, kept, merged, not_in_json, refuse_collision
from jobs.predict.places import Place
from jobs.predict.rows import Row, Shard
from jobs.spec_predict import Format

FOLDER, DONE = "parts", "done.jsonl"
STORED = "shards"
"""The folder of the files in the run's folder of an object store."""
Answer = Mapping[str, Any] | BadRow
"""What the model says of a row, or why it says nothing."""


@dataclass(frozen=True)
class Entry:
    """A shard that is done."""

    shard: int
    first: int
    rows: int
    input: str
    """SHA-256 (hex) of the rows that went in."""
    file: str
    bytes: int
    digest: str
    """SHA-256 (hex) of the file."""
    failed: Sequence[tuple[int, str, str]] = ()
    """The rows that have an error: number, where it is from, why."""
    pid: int = 0
    """The process that worked on it."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """What the answers say of themselves, added up: name → rows."""

    def bad_rows(self) -> dict[int, BadRow]:
        """Return the rows that have an error, by number."""
        return {number: BadRow(where, reason) for number, where, reason in self.failed}


@dataclass(frozen=True)
class Form:
    """How parts are written."""

    format: Format
    prefix: str
    where: bool
    wanted: Sequence[str] | None
    """The columns of the input to keep; None: all."""
    schema: Any
    """The Arrow schema of these, for Parquet."""

    def own(self, answer: Answer, row: Row) -> dict[str, Any]:
        """Return what is written beside a row's own columns."""
        said: dict[str, Any] = {} if isinstance(answer, BadRow) else dict(answer)
        said |= {WHERE: printable(row.where)} if self.where else {}
        said[ERROR] = printable(answer.reason) if isinstance(answer, BadRow) else None
        return {self.prefix + name: value for name, value in said.items()}

    def kept(self, row: Row) -> dict[str, Any]:
        """Return the row's own columns that are kept; none of one that cannot be read."""
        return {} if isinstance(row, BadRow) else kept(row, self.wanted)


def write(folder: Place, shard: Shard, answers: Sequence[Answer], form: Form) -> Entry:
    """Write a shard's part, on the disk, or in the store, when this returns.

    Raises:
        UserError: a prediction's column is called as one of the input's, or the format does not take it.
    """
    columns = list(map(form.kept, shard.rows))
    names = dict.fromkeys(name for row in columns for name in row)
    predicted = dict.fromkeys(name for answer in answers if not isinstance(answer, BadRow) for name in answer)
    refuse_collision([*names, *(form.schema.names if form.schema is not None else ())], list(predicted), form.prefix)
    if own := {ERROR, *([WHERE] if form.where else [])} & predicted.keys():
        raise UserError(f"predict: the task's predictions have a column {min(own)!r}, which the output has itself")
    if form.format == "jsonl":
        content, answers = _json_lines(columns, shard.rows, answers, form)
    else:
        content = _parquet(columns, shard.rows, answers, form)
    name = f"{shard.number:06d}-{secrets.token_hex(4)}.{form.format}"
    places.write(places.below(folder, name), content)
    failed = tuple(
        (number, answer.where, printable(answer.reason))
        for number, answer in enumerate(answers, shard.first)
        if isinstance(answer, BadRow)
    )
    digest = hashlib.sha256(content).hexdigest()
    return Entry(
        shard.number, shard.first, len(shard.rows), shard.digest, name, len(content), digest, failed, os.getpid()
    )


def _json_lines(
    kept: Sequence[Mapping[str, Any]], rows: Sequence[Row], answers: Sequence[Answer], form: Form
) -> tuple[bytes, list[Answer]]:
    """Return the lines, and the answers: one that JSON has no form for is an error of its row."""
    lines, written = [], list(answers)
    for at, (columns, row, answer) in enumerate(zip(kept, rows, answers, strict=True)):
        try:
            lines.append(json_line({**columns, **form.own(answer, row)}))
        except (ValueError, TypeError) as error:
            why = f"{error}, which JSON has not" if isinstance(error, TypeError) else not_in_json(error)
            written[at] = BadRow(row.where, f"the prediction holds {why}")
            lines.append(json_line({**columns, **form.own(written[at], row)}))
    return "".join(f"{line}\n" for line in lines).encode(), written


def _parquet(kept: Sequence[Mapping[str, Any]], rows: Sequence[Row], answers: Sequence[Answer], form: Form) -> bytes:
    import pyarrow
    import pyarrow.parquet

    own = [form.own(answer, row) for answer, row in zip(answers, rows, strict=True)]
    error = form.prefix + ERROR
    names = [name for name in dict.fromkeys(name for each in own for name in each) if name != error]
    known = {field.name: field.type for field in form.schema}
    arrays = {name: _column(name, [row.get(name) for row in kept], kind) for name, kind in known.items()}
    arrays |= {name: _column(name, [each.get(name) for each in own]) for name in names}
    arrays[error] = arrow([each.get(error) for each in own], pyarrow.string())
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(arrays), sink)
    return bytes(sink.getvalue())


def _column(name: str, values: Sequence[Any], kind: Any = None) -> Any:
    """Return a column, of the type that is known or that takes all values.

    Raises:
        UserError: there is none, or a value is beyond it.
    """
    import pyarrow

    try:
        return arrow(values, kind)
    except (pyarrow.ArrowException, OverflowError, UnicodeEncodeError) as error:
        if kind is None:
            kind = pyarrow.null()
            with suppress(pyarrow.ArrowException, OverflowError, UnicodeEncodeError):
                for value in values:
                    kind = merged(name, kind, arrow([value]).type, "predict")
                return arrow(values, kind)
        said = " ".join(str(error).split())[:200]
        raise UserError(f"predict: column {name!r} cannot be written to Parquet: {said}; {ONLY_JSON}") from error


class Done:
    """The shards that are done, over all attempts at a run; the driver's alone."""

    def __init__(self, run: Path, stored: str | None = None) -> None:
        """Take the run's folder, and where its files are if that is a store: the URI of a folder."""
        self.folder = run / FOLDER
        self.files: Place = stored or self.folder
        self.entries: dict[int, Entry] = {}

    def open(self) -> list[str]:
        """Take over what earlier attempts did, as far as it is whole; return in sentences what is not.

        Files without a line are removed: nobody knows whether they are whole.
        """
        self.folder.mkdir(exist_ok=True)
        noted = [_entry(line) for line in notes.lines(self.folder / DONE) if isinstance(line, dict)]
        self.entries = {entry.shard: entry for entry in noted if entry and self._is_whole(entry)}
        damaged = {entry.shard for entry in noted if entry} - self.entries.keys()
        self._write_anew()
        known = {entry.file for entry in self.entries.values()} | {DONE}
        for name in places.names(self.files):
            if name not in known:
                places.remove(places.below(self.files, name))
        return [f"{len(damaged)} shards are done again: their files are damaged or gone"] if damaged else []

    def add(self, entry: Entry) -> None:
        """Note that a shard is done, on the disk when this returns."""
        with (self.folder / DONE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(entry)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.entries[entry.shard] = entry

    def in_order(self) -> list[Entry]:
        """Return the shards that are done, by number."""
        return [self.entries[number] for number in sorted(self.entries)]

    def clear(self) -> None:
        """Remove the parts: their rows are in the output."""
        for folder in dict.fromkeys((self.files, self.folder)):
            places.clear(folder)

    def _is_whole(self, entry: Entry) -> bool:
        try:
            return hashlib.sha256(places.read(places.below(self.files, entry.file))).hexdigest() == entry.digest
        except FileNotFoundError:
            return False
        except OSError as error:
            if stores.is_clients(error):  # that a store does not answer says nothing of what it has
                raise
            return False

    def _write_anew(self) -> None:
        """Write the lines once more, without half ones behind which the next would be lost."""
        partial = self.folder / f".{DONE}.partial"
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(entry)) + "\n" for entry in self.in_order())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.folder / DONE)


def _entry(line: Mapping[str, Any]) -> Entry | None:
    try:
        return Entry(**{**line, "failed": tuple(map(tuple, line.get("failed", ())))})
    except TypeError:
        return None


def missing(entries: Iterable[Entry], rows: int) -> str | None:
    """Say what speaks against each row being there once, in the order of the entries; None where nothing does. Pure."""
    expected = 0
    for number, entry in enumerate(entries):
        if (entry.shard, entry.first) != (number, expected):
            return f"shard {entry.shard} begins with row {entry.first}, and row {expected} of shard {number} is next"
        expected += entry.rows
    return None if expected == rows else f"the parts hold {expected} rows, the input {rows}"
