"""Recordings in folders, or named by a glob, each with what says what was said in it.

An example is `audio` (the file's bytes) and `path` (its name from the folder on), and, where there is one, what a table
in the folder says of it (its other columns), LibriSpeech's `.trans.txt`, or a `.txt` beside the recording (`text`).
Where nothing says it, the task may read it out of the name.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from jobs.data import opening, readers, tables
from jobs.data.compression import kind
from jobs.data.examples import BadRow, Example, Rows, Source
from jobs.data.file_digests import file_digest
from jobs.data.joining import joined, sha256
from jobs.data.listing import Listing
from jobs.data.tables import TableForm
from jobs.tasks import audio

SUFFIXES = {".wav", ".flac", ".ogg", ".mp3"}
TABLES = ("transcripts", "transcript", "metadata")
"""Names of the tables that say what was said in the recordings beside them, as .csv, .tsv or .jsonl."""
FILE_COLUMNS = ("audio", "path", "file", "file_name", "filename", "audio_filepath", "wav")
"""What such a table calls the column with the file's name, the first that it has."""
LIBRISPEECH = ".trans.txt"
READING = "recordings 1"
"""Raise the number when the same bytes become other examples."""


def are_recordings(files: Sequence[Path], known: Container[str]) -> bool:
    """Tell whether files are recordings, with what belongs to them: more of them than of other files that are read."""
    heard = {path.with_suffix("") for path in files if _is_audio(path)}
    others = sum(kind(path) in known and not _is_table(path) and not _is_text(path, heard) for path in files)
    return len(heard) > others


def sources_in(found: Listing) -> list[Path]:
    """Return the files of a listing that are a source each: the tables that name recordings, or else these."""
    return [path for path in found.files if _is_table(path)] or [path for path in found.files if _is_audio(path)]


def recordings(name: str, root: Path, found: Listing, form: TableForm) -> Source:
    """Open the recordings of a listing.

    Args:
        root: the folder from which `path` is told.
    """
    heard = [path for path in found.files if _is_audio(path)]
    stems = {path.with_suffix("") for path in heard}
    listed = [path for path in found.files if _is_table(path)]
    texts = [path for path in found.files if not listed and _is_text(path, stems)]
    said = {*heard, *listed, *texts}
    for path in found.files:
        if path not in said:
            found.leave_out("no recording, nor a table or text that says what was said in one", _shown(path, root))
    parts = [_of_table(table, root, form) for table in listed] or _of_files(root, heard, texts)
    if listed:
        named = {path for table in listed for path in _all_named(table, root, form)}
        for path in heard:
            if path not in named:
                found.leave_out(f"a recording that {listed[0].name} does not name", _shown(path, root))
    return replace(joined(parts, found.notes(name)), name=name)


def _of_files(root: Path, heard: Sequence[Path], texts: Sequence[Path]) -> list[Source]:
    """Open recordings one by one, each with the text that lies beside it."""
    said = dict(_librispeech(path for path in texts if path.name.endswith(LIBRISPEECH)))
    said |= {path.with_suffix(""): _text(path) for path in texts if not path.name.endswith(LIBRISPEECH)}
    return opening.each(lambda path: _of_file(path, root, said.get(path.with_suffix(""))), heard)


def _of_file(path: Path, root: Path, text: str | None) -> Source:
    about = {} if text is None else {"text": text}
    shown = _shown(path, root)
    digest = sha256(f"{shown!r} {text!r} {file_digest(path)}")

    def read() -> Rows:
        yield _example(path, root, about, str(path))

    return Source(shown, digest, read, READING, origin=str(path.resolve()))


def _of_table(table: Path, root: Path, form: TableForm) -> Source:
    paths = sorted(_all_named(table, root, form))
    files = [table, *paths]
    digests = zip(files, opening.each(file_digest, files), strict=True)
    digest = sha256("".join(f"{_shown(path, root)!r} {of_file}\n" for path, of_file in digests))

    def read() -> Rows:
        for row in _reader(table, form)(table):
            yield row if isinstance(row, BadRow) else _heard(row, table, root)

    separated = table.suffix in tables.SEPARATORS
    reading = f"{READING} {table.suffix} {readers.VERSION} {tables.VERSION} {form}"
    return Source(table.name, digest, read, reading, tables=separated, origin=str(table.resolve()))


def _all_named(table: Path, root: Path, form: TableForm) -> set[Path]:
    """Return the recordings that the rows of a table name, as far as there are any."""
    rows = (row for row in _reader(table, form)(table) if isinstance(row, Example))
    return {found[1] for row in rows if (found := _named(row, table)) is not None}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data: {path}: {error}") from error


def _librispeech(files: Iterable[Path]) -> Iterator[tuple[Path, str]]:
    """Yield each recording's path without suffix, and its text, out of lines `NAME WORDS`."""
    for file in files:
        for line in _text(file).splitlines():
            name, _, text = line.strip().partition(" ")
            yield file.parent / name, text.strip()


def _heard(row: Example, table: Path, root: Path) -> Example | BadRow:
    """Return the example that a row of a table and the recording that it names make."""
    found = _named(row, table)
    if found is not None:
        column, path = found
        return _example(path, root, {key: value for key, value in row.items() if key != column}, row.where)
    column = next((name for name in FILE_COLUMNS if name in row), "")
    if not column:
        return BadRow(row.where, f"no column names the recording; it is one of {', '.join(FILE_COLUMNS)}")
    return BadRow(row.where, f"there is no recording {row[column]!r:.200} beside {table.name}")


def _named(row: Example, table: Path) -> tuple[str, Path] | None:
    """Return the column that names a recording, and the recording; None where there is none."""
    column = next((name for name in FILE_COLUMNS if name in row), "")
    value = row.get(column)
    if not isinstance(value, str) or not value:
        return None
    path = audio.beside(table, value)
    return None if path is None else (column, path)


def _reader(table: Path, form: TableForm) -> Callable[[Path], Rows]:
    separator = tables.SEPARATORS.get(table.suffix)
    return tables.read_separated(separator, form) if separator else readers.read_json_lines


def _example(path: Path, root: Path, about: Mapping[str, Any], where: str) -> Example:
    return Example({**about, "audio": path.read_bytes(), "path": _shown(path, root)}, where)


def _is_audio(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def _is_table(path: Path) -> bool:
    return path.stem.lower() in TABLES and path.suffix in (*tables.SEPARATORS, ".jsonl")


def _is_text(path: Path, heard: Container[Path]) -> bool:
    """Tell whether a file of text lies beside the recording that it belongs to, or is LibriSpeech's."""
    return path.name.endswith(LIBRISPEECH) or (path.suffix == ".txt" and path.with_suffix("") in heard)


def _shown(path: Path, root: Path) -> str:
    return str(path.relative_to(root) if path.is_relative_to(root) else path)
