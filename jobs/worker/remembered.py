"""What passes over so many rows took, kept in the storage by what decides it. Whoever loses it has to try again.

storage/micro-batches/<digest>.json      {"1": [held, kept, peak], "16": null}      bytes; null: there was not enough
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from jobs import notes
from jobs.worker.rows_search import Took, Tried


def digest(what: Mapping[str, Any]) -> str:
    """Return a name for what decides the memory: the model, the rows, the workers."""
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:16]


def read(place: Path) -> dict[int, Took | None]:
    """Return rows → what was measured; empty where nothing is, or nothing that can be read."""
    try:
        found = {int(rows): took and Took(*map(int, took)) for rows, took in notes.read(place).items()}
    except (OSError, ValueError, TypeError):
        return {}
    return {rows: took or None for rows, took in found.items()}


def write(place: Path, tried: Tried) -> None:
    """Keep what was measured; a storage that does not take it costs a later run its trials."""
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        notes.write(place, {str(rows): tried[rows] for rows in sorted(tried)})


def too_many(place: Path, rows: int) -> None:
    """Keep that so many rows, and more, did not fit, whatever a trial has said."""
    tried = read(place)
    write(place, {rows: None, **{each: took if each < rows else None for each, took in tried.items()}})
