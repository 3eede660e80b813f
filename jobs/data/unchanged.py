"""What was found out about files by reading them whole, kept so that the next start reads those only that changed.

    with unchanged.kept_in(storage / "digests"):          while a job's data is opened
        with unchanged.noted_for(["images"], base):       the files below share a note
            unchanged.found(path, "sha256", read_it)      what the note says of the file, or what `read_it` does

storage/digests/<what is named>.json      {"format": 1, "files": {path: [state, {"sha256": …}]}}

A file is taken to be as it was where its size, its inode, and when its content (mtime) and anything of it (ctime) was
changed, in ns, are as they were. A ctime cannot be set (but on FAT, which has none): who gives a changed file its old
mtime (`cp -p`, `rsync -t`, `touch -d`) gives it a new ctime. Nothing is kept of a file that had changed less than
SETTLED_S before it was read: the clock of a file system ticks slowly, and another change could leave the same times.
Git trusts its index by that rule (its Documentation/technical/racy-git.txt). Elsewhere `found` just reads.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 1
"""Raise it when a fact of one name gets another shape."""
SETTLED_S = 60.0
"""The clock of a file server may be behind this machine's, and that of a file system ticks every two seconds (FAT)."""

State = list[int]
"""Size, inode, mtime and ctime of a file."""
Facts = dict[str, Any]
"""What was found out about a file: JSON, by names."""


@dataclass
class _Note:
    """What is known of some files, and what of it is still true."""

    place: Path
    before: dict[str, tuple[State, Facts]]
    now: dict[str, tuple[State, Facts]] = field(default_factory=dict)

    def facts(self, path: str, state: State) -> Facts:
        """Return what is known of a file in this state."""
        known, facts = self.now.get(path) or self.before.get(path) or (state, {})
        return dict(facts) if known == state else {}


_FOLDER: ContextVar[Path | None] = ContextVar("folder of notes", default=None)
_NOTE: ContextVar[_Note | None] = ContextVar("note", default=None)


@contextmanager
def kept_in(folder: Path) -> Iterator[None]:
    """Keep in this folder what is found out about files meanwhile."""
    token = _FOLDER.set(folder)
    try:
        yield
    finally:
        _FOLDER.reset(token)


@contextmanager
def noted_for(named: str | Sequence[str], base: Path) -> Iterator[None]:
    """Keep what is found out meanwhile in one note: of these names, whose relative paths start at `base`.

    Nothing of files that are not asked for any more is kept. Within another note, that one is it.
    """
    folder = _FOLDER.get()
    if folder is None or _NOTE.get() is not None:
        yield
        return
    places = [os.path.join(base, os.path.expanduser(each)) for each in ([named] if isinstance(named, str) else named)]
    place = folder / f"{hashlib.sha256(json.dumps(places).encode()).hexdigest()[:16]}.json"
    note = _Note(place, _read(place))
    token = _NOTE.set(note)
    try:
        yield
    except BaseException:
        note.now = {**note.before, **note.now}
        raise
    finally:
        _NOTE.reset(token)
        if note.now != note.before:
            _write(place, note.now)


def found(path: Path, what: str, read: Callable[[], Any]) -> Any:
    """Return what is known of a file under a name, else what `read` returns of it, JSON, which is kept."""
    note = _NOTE.get()
    if note is None:
        return read()
    began, state = time.time_ns(), _state(path)
    facts = note.facts(str(path), state)
    if what not in facts:
        made = read()
        if not state or _state(path) != state or began - max(state[2:]) < SETTLED_S * 1e9:
            return made
        facts[what] = made
    note.now[str(path)] = (state, facts)
    return facts[what]


def _state(path: Path) -> State:
    """Return what tells a file from what it becomes; nothing of one that cannot be asked."""
    try:
        with path.open("rb") as file:  # a network file system asks its server when a file is opened; `stat` may not
            about = os.fstat(file.fileno())
    except OSError:  # reading it says why
        return []
    return [about.st_size, about.st_ino, about.st_mtime_ns, about.st_ctime_ns]


def _read(place: Path) -> dict[str, tuple[State, Facts]]:
    """Return what a note says; nothing of one that is not there, or damaged."""
    try:
        content = json.loads(place.read_bytes())
        files = content["files"] if content["format"] == FORMAT else {}
        return {path: (list(state), dict(facts)) for path, (state, facts) in files.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _write(place: Path, files: dict[str, tuple[State, Facts]]) -> None:
    """Write a note whole or not at all; a storage that does not take it costs the next start its reading."""
    aside = place.with_name(f".{place.name}.{secrets.token_hex(4)}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps({"format": FORMAT, "files": files}), encoding="utf-8")
        aside.replace(place)
    except BaseException as error:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
