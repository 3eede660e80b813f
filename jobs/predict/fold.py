"""Parts of a prediction → one file, in their order, with a manifest that proves that each row is there once.

The output appears whole, by a rename; the manifest, `<output>.manifest.json`, before it.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from cluster.errors import UserError
from jobs import notes
from jobs.predict.columns import ERROR, merged
from jobs.predict.parts import Entry, missing
from jobs.spec_predict import Format

Say = Callable[[int], None]
"""Is told how many rows are written."""


class DamagedPart(UserError):
    """A part is not what was written; submitted again, the job does its rows again."""

    exit_code = 1


def manifest_of(output: Path) -> Path:
    """Return where the manifest of an output is."""
    return output.with_name(f"{output.name}.manifest.json")


def check_free(output: Path, run: str) -> bool:
    """Return True where the output is there already, and this run has made it.

    Raises:
        UserError: something else is there.
    """
    if not os.path.lexists(output):
        return False
    try:
        made_by = notes.read(manifest_of(output)).get("run")
    except UserError:
        made_by = None
    if made_by != run or not output.is_file():
        raise UserError(
            f"predict.output: {output} is there already, and is not overwritten: remove it, or name another"
        )
    return True


def fold(
    parts: Path,
    entries: Sequence[Entry],
    output: Path,
    format: Format,
    about: dict[str, Any],
    prefix: str = "",
    say: Say = lambda rows: None,
) -> dict[str, Any]:
    """Write the output and its manifest; return the manifest.

    Args:
        parts: the folder of the parts.
        about: what the manifest says besides; `rows` is the number of rows that went in.
        prefix: of the predictions' columns: that of the errors is the last.

    Raises:
        DamagedPart: a part is not what was written.
        UserError: a column of the predictions has no type that takes all of its values.
    """
    if (wrong := missing(entries, about["rows"])) is not None:
        raise RuntimeError(f"the prediction is not whole: {wrong}")
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("wb") as file:
            _FOLDS[format](parts, entries, file, prefix, say)
            file.flush()
            os.fsync(file.fileno())
        whole = {**about, "output": {"file": output.name, **_measured(partial)}, "shards": list(map(_said_of, entries))}
        _write_manifest(manifest_of(output), whole)
        try:
            os.link(partial, output)  # fails where something has come there meanwhile
        except FileExistsError:
            raise UserError(
                f"predict.output: {output} is there now, and is not overwritten: remove it, and submit again"
            ) from None
        except OSError:  # a file system without hard links
            partial.rename(output)
    finally:
        partial.unlink(missing_ok=True)
    return whole


def _fold_lines(parts: Path, entries: Sequence[Entry], file: BinaryIO, prefix: str, say: Say) -> None:
    rows = 0
    for entry in entries:
        file.write(_content(parts, entry))
        say(rows := rows + entry.rows)


def _fold_parquet(parts: Path, entries: Sequence[Entry], file: BinaryIO, prefix: str, say: Say) -> None:
    """Write a row group for each part, with the types that take the values of all."""
    import pyarrow
    import pyarrow.parquet as parquet

    kinds: dict[str, Any] = {}
    for entry in entries:
        for column in parquet.read_schema(parts / entry.file):
            known = kinds.get(column.name)
            kinds[column.name] = column.type if known is None else merged(column.name, known, column.type, "predict")
    if (error := kinds.pop(prefix + ERROR, None)) is not None:
        kinds[prefix + ERROR] = error
    schema, rows = pyarrow.schema(list(kinds.items())), 0
    with parquet.ParquetWriter(file, schema) as writer:
        for entry in entries:
            table = parquet.read_table(pyarrow.BufferReader(_content(parts, entry)))
            if table.num_rows != entry.rows:
                raise DamagedPart(f"{parts / entry.file} holds {table.num_rows} rows instead of {entry.rows}")
            writer.write_table(pyarrow.table([_cast(table, column) for column in schema], schema=schema))
            say(rows := rows + entry.rows)


def _cast(table: Any, column: Any) -> Any:
    import pyarrow

    if column.name not in table.column_names:
        return pyarrow.nulls(table.num_rows, column.type)
    found = table.column(column.name)
    return found if found.type == column.type else pyarrow.array(found.to_pylist(), column.type)


_FOLDS: dict[Format, Callable[[Path, Sequence[Entry], BinaryIO, str, Say], None]] = {
    "jsonl": _fold_lines,
    "parquet": _fold_parquet,
}


def _content(parts: Path, entry: Entry) -> bytes:
    try:
        content = (parts / entry.file).read_bytes()
    except FileNotFoundError:
        raise DamagedPart(f"{parts / entry.file} is gone: submit the job again, and its rows are done again") from None
    if hashlib.sha256(content).hexdigest() != entry.digest:
        raise DamagedPart(f"{parts / entry.file} is damaged: submit the job again, and its rows are done again")
    return content


def _measured(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _said_of(entry: Entry) -> dict[str, Any]:
    return {"first": entry.first, "rows": entry.rows, "failed": len(entry.failed), "input": entry.input}


def _write_manifest(path: Path, values: dict[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(values, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
