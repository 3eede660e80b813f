"""Small JSON files by which processes tell each other how a run stands: whole or not at all, or refused by name."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from cluster.errors import UserError


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
