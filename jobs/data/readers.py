"""Raw examples out of one file: text, JSON lines, JSON. A bad row is an item too, not the end.

A row that cannot be read comes as `BadRow`, with file and line; whether it ends the job or is left out is for
jobs/data/examples.py to say. A file of which nothing can be read is one such row. Tables: jobs/data/tables.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from cluster.unique_keys import KeyTwice, unique
from jobs.data import coco
from jobs.data.compression import open_content
from jobs.data.examples import BadRow, Cut, Example, Rows, bounded, unread
from jobs.data.remote import Place

VERSION = 4
"""Raise it when a reader of this file makes something else of the same bytes: rows encoded before are not used."""

TEXT_SUFFIXES = {".txt", ".md", ".rst", ".py", ".text"}
_DECODER = json.JSONDecoder(object_pairs_hook=unique)
"""Made once: json.loads makes one for each line."""
_COCO = "COCO's images are files beside it, which are read from disks only: make tars of them (docs/sources.md)"
_CONVERSATION = {"messages", "conversations", "prompt", "completion"}


def read_text(path: Place) -> Rows:
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


def read_json_lines(path: Place) -> Rows:
    """Read one object a line; empty lines and a byte order mark are passed over."""
    with open_content(path) as file:
        yield from _json_lines(path, file)


def read_json_lines_cut(path: Place, cut: Cut) -> Rows:
    """Read the lines of a part of a file, numbered as in the whole; by their bytes where no line before was counted."""
    with path.open("rb") as file:
        file.seek(cut.start)
        lines = _up_to(file, cut.end - cut.start)
        yield from _json_lines(path, lines, cut.before + 1) if cut.before >= 0 else _by_bytes(path, lines, cut.start)


def _by_bytes(path: Place, lines: Iterable[bytes], at: int) -> Rows:
    """Read lines of which it is known at which byte of the file each begins."""
    for line in lines:
        if line.strip(b" \t\r\n\xef\xbb\xbf"):
            where = f"{path}: byte {at}"
            yield bounded(partial(_json_line, line, where), where)
        at += len(line)


def _up_to(lines: Iterable[bytes], size: int) -> Iterator[bytes]:
    """Yield lines until they come to `size` bytes."""
    for line in lines if size > 0 else ():
        yield line
        size -= len(line)
        if size <= 0:
            return


def _json_lines(path: Place, lines: Iterable[bytes], first: int = 1) -> Rows:
    for number, line in enumerate(lines, first):
        if line.strip(b" \t\r\n\xef\xbb\xbf"):
            where = f"{path}:{number}"
            yield bounded(partial(_json_line, line, where), where)


def _json_line(line: bytes, where: str) -> Example:
    return Example(json_object(line, "a line", "a list of objects is a .json"), where)


def json_object(line: bytes, what: str, hint: str) -> dict[str, Any]:
    """Return the object that `what` holds, each of its keys once.

    Raises:
        UserError: it holds something else, with a `hint` where that is a list.
    """
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
        raise UserError(f"{what} holds one object, this is a list; {hint}")
    if not isinstance(value, dict):
        raise UserError(f"{what} holds one object, this is a {type(value).__name__}")
    return value


def read_json(path: Place) -> Rows:
    """Read a list of objects, or one object a line, which many files of this name hold."""
    with open_content(path) as file:
        first = [line for line in islice(file, 64) if line.strip(b" \t\r\n\xef\xbb\xbf")][:2]
    if not any(map(_opens_a_list, first[:1])) and any(isinstance(_line_alone(line), Example) for line in first):
        rows = read_json_lines(path)
        yield from _one_or_more(path, rows) if len(first) == 1 else rows
        return
    with open_content(path) as file:
        yield from _document(path, file.read())


def _line_alone(line: bytes) -> Example | BadRow:
    return bounded(partial(_json_line, line, ""), "")


def _opens_a_list(line: bytes) -> bool:
    """Tell whether a line begins a list that goes on in the next ones."""
    text = line.decode("utf-8-sig", "replace").lstrip()
    if not text.startswith("["):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return True
    return False


def _one_or_more(path: Place, rows: Rows) -> Rows:
    """Pass the single object of a file on, unless it is a COCO data set, or a wrapping of the list that is meant."""
    for row in rows:
        if isinstance(row, Example) and coco.is_coco(row):
            yield from coco.examples(path, row) if isinstance(path, Path) else iter([unread(str(path), _COCO)])
            continue
        lists = [
            key for key, value in row.items() if isinstance(value, list) and value and isinstance(value[0], dict)
        ] if isinstance(row, Example) else []  # fmt: skip
        if lists and not _CONVERSATION & set(lists):
            yield unread(
                str(path),
                f"one object, not a list of them; its list is under {lists[0]!r}: save that list alone (jq .KEY), or "
                "one object a line as .jsonl",
            )
        else:
            yield row


def _document(path: Place, content: bytes) -> Rows:
    """Read JSON as a whole; where something in it cannot be read, entry by entry."""
    try:
        value = _parsed(content.decode("utf-8-sig"))
    except (UserError, ValueError, RecursionError):
        yield from _entries(path, content)
        return
    if isinstance(value, dict):
        yield from _one_or_more(path, iter([Example(value, str(path))]))
    elif isinstance(value, list):
        for number, entry in enumerate(value):
            where = f"{path}[{number}]"
            yield Example(entry, where) if isinstance(entry, dict) else BadRow(where, "not an object")
    else:
        yield unread(str(path), f"expected a list of objects, this is a {type(value).__name__}")


def _entries(path: Place, content: bytes) -> Rows:
    """Read JSON of which something cannot be read: entry by entry where its form is right, else none of it."""
    try:
        texts = _texts(content.decode("utf-8-sig", "surrogateescape"))
    except json.JSONDecodeError as error:
        hint = "one object a line is .jsonl, and a glob in data.train leaves out what is no data"
        yield unread(f"{path}:{error.lineno}", f"not valid JSON: {error.msg}; {hint}")
        return
    except RecursionError:
        yield unread(str(path), "nested too deeply")
        return
    for number, text in enumerate(texts):
        where = f"{path}[{number}]"
        line = text.encode("utf-8", "surrogateescape")
        yield bounded(partial(_json_line, line, where), where) if text[0] == "{" else BadRow(where, "not an object")


def _texts(text: str) -> list[str]:
    """Return the entries of a list in JSON, or what else it is, as the texts that they are.

    Raises:
        json.JSONDecodeError: it is not JSON.
        RecursionError: it is nested too deeply.
    """
    decoder = json.JSONDecoder(parse_int=len)  # of thousands of digits no number is made
    texts, at = list[str](), _next(text, 0)
    closes = "]" if text[at : at + 1] == "[" else ""
    at = _next(text, at + len(closes))
    while not (closes and not texts and text.startswith(closes, at)):
        begins, (_, at) = at, decoder.raw_decode(text, at)
        texts.append(text[begins:at])
        at = _next(text, at)
        if not closes or text.startswith(closes, at):
            break
        if not text.startswith(",", at):
            raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
        at = _next(text, at + 1)
    if text[at + len(closes) :].strip():
        raise json.JSONDecodeError("Extra data", text, at + len(closes))
    return texts


def _next(text: str, at: int) -> int:
    """Return where the next character stands that is no white space; the end, where none does."""
    while text[at : at + 1].isspace():
        at += 1
    return at


def _parsed(text: str) -> Any:
    if text.startswith("\ufeff"):
        return json.loads(text)  # which says so
    return _DECODER.decode(text)


READERS: dict[str, Callable[[Place], Rows]] = {
    **dict.fromkeys(TEXT_SUFFIXES, read_text),
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json,
}

CUT_READERS: dict[str, Callable[[Place, Cut], Rows]] = dict.fromkeys((".jsonl", ".ndjson"), read_json_lines_cut)
"""Of the files of lines: what reads a part of one."""
