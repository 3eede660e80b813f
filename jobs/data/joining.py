"""Several sources as one: each file is read once, whatever names it, and what of them does not go together is said."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from jobs.data.compression import kind
from jobs.data.examples import Source, printable
from jobs.data.listing import NAMED
from jobs.data.readers import TEXT_SUFFIXES


def joined(sources: list[Source], notes: tuple[str, ...] = ()) -> Source:
    """Return one source of several, in their order, with the notes of all behind `notes`."""
    name = sources[0].name if len(sources) == 1 else f"{sources[0].name} and {len(sources) - 1} more"
    return Source(
        name,
        sha256("".join(source.digest for source in sources)),
        lambda: (example for source in sources for example in source.read()),
        sha256("\n".join(source.reading for source in sources)),
        tuple(dict.fromkeys([*notes, *(note for source in sources for note in source.notes)])),
        any(source.names_files for source in sources),
        any(source.tables for source in sources),
        parts=tuple(single for source in sources for single in source.singles),
    )


def once(sources: list[Source]) -> list[Source]:
    """Leave out of sources what an earlier one, or an earlier part, holds already; say so in the notes."""
    seen: set[str] = set()
    kept: list[Source] = []
    for source in sources:
        fresh = [part for part in source.singles if not part.origin or part.origin not in seen]
        again = [part.name for part in source.singles if part.origin and part.origin in seen]
        seen.update(part.origin for part in source.singles)
        if not again:
            kept.append(source)
            continue
        note = f"{_counted(again)} left out (named before: each file is read once): {_some(again)}"
        if fresh:
            kept.append(replace(joined(fresh, (*source.notes, note)), name=source.name))
        else:
            kept[-1] = replace(kept[-1], notes=(*kept[-1].notes, note))
    return kept


def said_of_kinds(name: str, source: Source) -> tuple[str, ...]:
    """Say where files of text stand beside files of rows: each of them is an example of its own."""
    files = [part for part in source.singles if part.origin]
    texts = [part.name for part in files if _kind_of(part) in TEXT_SUFFIXES]
    if not texts or len(texts) == len(files):
        return ()
    return (f"{name}: {_counted(texts)} of plain text beside files of rows, each read as one text: {_some(texts)}",)


def _kind_of(part: Source) -> str:
    return kind(Path(part.name))


def sha256(text: str) -> str:
    """Return the SHA-256 of a text, in hex."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _counted(names: list[str]) -> str:
    return "1 file" if len(names) == 1 else f"{len(names)} files"


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return printable(", ".join(names[:NAMED]) + (", …" if len(names) > NAMED else ""))
