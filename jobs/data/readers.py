"""Raw examples out of one file: text, JSON lines, JSON. A bad row is an item too, not the end.

A row that cannot be read comes as `BadRow`, with file and line; whether it ends the job or is left out is for
jobs/data/examples.py to say. A file that cannot be read at all is a UserError. Tables are read by jobs/data/tables.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from cluster.unique_keys import KeyTwice, unique
from jobs.data.compression import open_content
from jobs.data.examples import BadRow, Example, Rows, bounded

VERSION = 3
"""Raise it when a reader of this file makes something else of the same bytes: rows encoded before are not used."""

TEXT_SUFFIXES = {".txt", ".md", ".rst", ".py", ".text"}
_CONVERSATION = {"messages", "conversations", "prompt", "completion"}


def read_text(path: Path) -> Rows:
    """Read a file as one example, `text`."""
    with open_content(path) as file:
        content = file.read()
    if not content.strip(b" \t\r\n\xef\xbb\xbf"):
        yield BadRow(str(path), "the file holds no text")
        return
    if b"\0" in content:
        line = content[: content.index(b"\0")].count(b"\n") + 1
        yield BadRow(f"{path}:{line}", "a NUL byte: no text in UTF-8 (perhaps in UTF-16); convert the file")
        return
    try:
        yield Example({"text": content.decode("utf-8-sig")}, str(path))
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        yield BadRow(f"{path}:{line}", not_utf8(content[error.start]))


def not_utf8(byte: int) -> str:
    """Say that a byte is no UTF-8."""
    return f"byte 0x{byte:02x} is not UTF-8; convert the file"


def read_json_lines(path: Path) -> Rows:
    """Read one object a line; empty lines and a byte order mark are passed over."""
    with open_content(path) as file:
        yield from _json_lines(path, file)


def _json_lines(path: Path, lines: Iterable[bytes]) -> Rows:
    for number, line in enumerate(lines, 1):
        if line.strip(b" \t\r\n\xef\xbb\xbf"):
            where = f"{path}:{number}"
            yield bounded(partial(_json_line, line, where), where)


def _json_line(line: bytes, where: str) -> Example:
    try:
        value = _parsed(line.decode("utf-8-sig").rstrip())
    except UnicodeDecodeError as error:
        raise UserError(not_utf8(error.object[error.start])) from None
    except json.JSONDecodeError as error:
        raise UserError(f"not valid JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise UserError("nested too deeply") from None
    except KeyTwice:
        raise
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"not readable JSON: {error}") from None
    if isinstance(value, list):
        raise UserError("a line holds one object, this is a list; a list of objects is a .json")
    if not isinstance(value, dict):
        raise UserError(f"a line holds one object, this is a {type(value).__name__}")
    return Example(value, where)


def read_json(path: Path) -> Rows:
    """Read a list of objects, or one object a line, which many files of this name hold."""
    with open_content(path) as file:
        first = [line for line in islice(file, 64) if line.strip(b" \t\r\n\xef\xbb\xbf")][:2]
    if any(isinstance(bounded(partial(_json_line, line, ""), ""), Example) for line in first):
        rows = read_json_lines(path)
        yield from _one_or_more(path, rows) if len(first) == 1 else rows
        return
    with open_content(path) as file:
        value = _document(path, file.read())
    if isinstance(value, dict):
        yield from _one_or_more(path, iter([Example(value, str(path))]))
        return
    if not isinstance(value, list):
        raise UserError(f"{path}: expected a list of objects, this is a {type(value).__name__}")
    for number, entry in enumerate(value):
        where = f"{path}[{number}]"
        yield Example(entry, where) if isinstance(entry, dict) else BadRow(where, "not an object")


def _one_or_more(path: Path, rows: Rows) -> Rows:
    """Pass the single object of a file on, unless it is a wrapping of the list that is meant."""
    for row in rows:
        lists = [
            key for key, value in row.items() if isinstance(value, list) and value and isinstance(value[0], dict)
        ] if isinstance(row, Example) else []  # fmt: skip
        if lists and not _CONVERSATION & set(lists):
            raise UserError(
                f"{path}: one object, not a list of them; its list is under {lists[0]!r}: save that list alone "
                "(jq .KEY), or one object a line as .jsonl"
            )
        yield row


def _document(path: Path, content: bytes) -> Any:
    try:
        return _parsed(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: {not_utf8(content[error.start])}") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{error.lineno}: not valid JSON: {error.msg}; one object a line is .jsonl, and a "
            "glob in data.train leaves out what is no data"
        ) from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except ValueError as error:
        raise UserError(f"{path}: not readable JSON: {error}") from None


def _parsed(text: str) -> Any:
    return json.loads(text, object_pairs_hook=unique)


READERS: dict[str, Callable[[Path], Rows]] = {
    **dict.fromkeys(TEXT_SUFFIXES, read_text),
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json,
}
