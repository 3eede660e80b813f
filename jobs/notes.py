"""Small JSON files by which processes tell each other how a run stands: whole or not at all, or refused by name."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from cluster.errors import UserError

Note = TypeVar("Note")


class DamagedNote(UserError, ValueError):
    """A file of a run's folder does not hold what it should."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            f"{path} is damaged ({reason}): bring it back, or begin a new run with --set checkpoint.resume=never"
        )


def read(path: Path) -> dict[str, Any]:
    """Return what a note holds; nothing where there is none.

    Raises:
        DamagedNote: it is no JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DamagedNote(path, str(error)) from error
    if not isinstance(found, dict):
        raise DamagedNote(path, "it holds no mapping")
    return found


def made(path: Path, kind: type[Note], values: Mapping[str, Any]) -> Note:
    """Return a note as what it stands for.

    Raises:
        DamagedNote: it has other fields, or lacks some.
    """
    try:
        return kind(**values)
    except TypeError as error:
        raise DamagedNote(path, str(error).partition("() ")[2] or str(error)) from error


def lines(path: Path) -> list[Any]:
    """Return the values of a file of JSON lines; nothing where there is none.

    Half lines, as a process that was killed or a full disk leaves them, are passed over: they were never whole.
    """
    found = []
    with suppress(FileNotFoundError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError):
                found.append(json.loads(line))
    return found


def write(path: Path, values: Any) -> None:
    """Write a note whole or not at all, also where the machine dies: another process may read at any time."""
    partial = path.with_suffix(".partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            json.dump(values, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
