"""Parts of a prediction → one file, in their order, with a manifest that proves that each row is there once.

The output appears whole, by a rename, or as a store copies it from a name beside it; the manifest,
`<output>.manifest.json`, before it.
"""

from __future__ import annotations

import hashlib
import io
import os
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from cluster import store_uri, stores
from cluster.errors import UserError
from jobs.checkpoint.store import CHUNK_BYTES, Store
from jobs.predict import places
from jobs.predict.columns import ERROR, merged
from jobs.predict.parts import Entry, missing
from jobs.predict.places import Place
from jobs.spec_predict import Format

Say = Callable[[int], None]
"""Is told how many rows are written."""


class DamagedPart(UserError):
    """A part is not what was written; submitted again, the job does its rows again."""

    exit_code = 1


def manifest_of(output: Place) -> Place:
    """Return where the manifest of an output is."""
    return places.beside(output, ".manifest.json")


def check_free(output: Place, run: str) -> bool:
    """Return True where the output is there already, and this run has made it.

    Raises:
        UserError: something else is there.
    """
    if not places.is_there(output):
        return False
    try:
        made_by = places.note(manifest_of(output)).get("run")
    except UserError:
        made_by = None
    if made_by != run or not (isinstance(output, str) or output.is_file()):
        raise UserError(
            f"predict.output: {places.shown(output)} is there already, and is not overwritten: remove it, or name "
            "another"
        )
    return True


def fold(
    parts: Place,
    entries: Sequence[Entry],
    output: Place,
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
    write = partial(_FOLDS[format], parts, entries, prefix=prefix, say=say)
    if isinstance(output, Path):
        return _to_disk(output, write, about, entries)
    return _to_store(output, write, about, entries)


def _to_disk(
    output: Path, write: Callable[[Any], None], about: dict[str, Any], entries: Sequence[Entry]
) -> dict[str, Any]:
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = output.with_name(f".{output.name}.{secrets.token_hex(4)}.partial")
    try:
        with aside.open("wb") as file:
            counted = _Counted(file)
            write(counted)
            file.flush()
            os.fsync(file.fileno())
        whole = counted.described(output, about, entries)
        if places.is_there(output):  # its manifest stays too: it would be taken for this run's
            raise _there_now(output)
        places.keep(manifest_of(output), whole)
        try:
            os.link(aside, output)  # fails where something has come there meanwhile
        except FileExistsError:
            raise _there_now(output) from None
        except OSError:  # a file system without hard links
            aside.rename(output)
    finally:
        aside.unlink(missing_ok=True)
    return whole


def _to_store(
    output: str, write: Callable[[Any], None], about: dict[str, Any], entries: Sequence[Entry]
) -> dict[str, Any]:
    """Write beside the output: a store's file is there once it is closed, and a stream cannot be left unclosed.

    Somebody else's file that comes between the last look and the copy is overwritten: no store that pyarrow knows can
    be asked through it to write only what is not there.
    """
    aside = str(places.beside(output, f".partial-{about['run']}"))  # a killed attempt's is written anew by the next
    try:
        with places.stream(aside) as sink:
            counted = _Counted(sink)
            write(counted)
        whole = counted.described(output, about, entries)
        if places.is_there(output):
            raise _there_now(output)
        places.keep(manifest_of(output), whole)
        _copy(aside, output)
    finally:
        with suppress(OSError):  # the store has failed: what is to be said is why
            places.remove(aside)
    return whole


def _copy(source: str, target: str) -> None:
    """Copy a file of a store within its folder: by the store itself, or through here, where it refuses.

    S3 copies no more than 5 GB itself.
    """
    (folder, name), (_, old) = store_uri.split(target), store_uri.split(source)
    files, base = stores.opened(folder)
    try:
        files.copy_file(f"{base}/{old}", f"{base}/{name}")  # once: what refuses a copy refuses it again
    except (OSError, NotImplementedError):
        with Store(folder).input(old) as content, places.stream(target) as sink:
            while piece := content.read(CHUNK_BYTES):
                sink.write(piece)


def _there_now(output: Place) -> UserError:
    return UserError(
        f"predict.output: {places.shown(output)} is there now, and is not overwritten: remove it, and submit again"
    )


class _Counted(io.RawIOBase):
    """What parts are written to, which digests what passes."""

    def __init__(self, sink: Any) -> None:
        self._sink, self._digest, self._bytes = sink, hashlib.sha256(), 0

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        """Write all of it."""
        view = memoryview(content).cast("B")
        self._sink.write(view)
        self._digest.update(view)
        self._bytes += view.nbytes
        return view.nbytes

    def tell(self) -> int:
        """Return how much was written."""
        return self._bytes

    def described(self, output: Place, about: dict[str, Any], entries: Sequence[Entry]) -> dict[str, Any]:
        """Return the manifest of what was written."""
        name = Path(places.shown(output)).name
        file = {"file": name, "bytes": self._bytes, "sha256": self._digest.hexdigest()}
        return {**about, "output": file, "shards": list(map(_said_of, entries))}


def _fold_lines(parts: Place, entries: Sequence[Entry], file: Any, prefix: str, say: Say) -> None:
    rows = 0
    for entry in entries:
        file.write(_content(parts, entry))
        say(rows := rows + entry.rows)


def _fold_parquet(parts: Place, entries: Sequence[Entry], file: Any, prefix: str, say: Say) -> None:
    """Write a row group for each part, with the types that take the values of all."""
    import pyarrow
    import pyarrow.parquet as parquet

    kinds: dict[str, Any] = {}
    for entry in entries:
        for column in _schema(parts, entry):
            known = kinds.get(column.name)
            kinds[column.name] = column.type if known is None else merged(column.name, known, column.type, "predict")
    if (error := kinds.pop(prefix + ERROR, None)) is not None:
        kinds[prefix + ERROR] = error
    schema, rows = pyarrow.schema(list(kinds.items())), 0
    with parquet.ParquetWriter(file, schema) as writer:
        for entry in entries:
            table = parquet.read_table(pyarrow.BufferReader(_content(parts, entry)))
            if table.num_rows != entry.rows:
                raise DamagedPart(f"{_where(parts, entry)} holds {table.num_rows} rows instead of {entry.rows}")
            writer.write_table(pyarrow.table([_cast(table, column) for column in schema], schema=schema))
            say(rows := rows + entry.rows)


def _cast(table: Any, column: Any) -> Any:
    import pyarrow

    if column.name not in table.column_names:
        return pyarrow.nulls(table.num_rows, column.type)
    found = table.column(column.name)
    return found if found.type == column.type else pyarrow.array(found.to_pylist(), column.type)


def _schema(parts: Place, entry: Entry) -> Any:
    import pyarrow
    import pyarrow.parquet as parquet

    if isinstance(parts, Path):
        return parquet.read_schema(parts / entry.file)
    return parquet.read_schema(pyarrow.BufferReader(_content(parts, entry)))


_FOLDS: dict[Format, Callable[..., None]] = {
    "jsonl": _fold_lines,
    "parquet": _fold_parquet,
}


def _content(parts: Place, entry: Entry) -> bytes:
    try:
        content = places.read(places.below(parts, entry.file))
    except FileNotFoundError:
        raise DamagedPart(
            f"{_where(parts, entry)} is gone: submit the job again, and its rows are done again"
        ) from None
    if hashlib.sha256(content).hexdigest() != entry.digest:
        raise DamagedPart(f"{_where(parts, entry)} is damaged: submit the job again, and its rows are done again")
    return content


def _where(parts: Place, entry: Entry) -> str:
    return places.shown(places.below(parts, entry.file))


def _said_of(entry: Entry) -> dict[str, Any]:
    return {"first": entry.first, "rows": entry.rows, "failed": len(entry.failed), "input": entry.input}
