"""What has changed in a folder since it was looked at last, and the same put into its copy on another node.

    here = Copy(folder, notes);  there = Copy(folder on another node, everything)
    there.apply(here.pending())       small files whole, those that grow by what was added

Two copies tell each other; what one was told it does not tell back. Of a file that both write the last one told stands,
but for files that grow (logs, JSON lines): what each adds is in both, in an order that may differ.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

PIECE_BYTES = 8 << 20
"""A larger file goes in pieces."""
AT_ONCE_BYTES = 32 << 20
"""So much is told at a time."""
GROWING = (".jsonl", ".log", ".txt")
"""Files to which is only added, by their ends."""
PASSING = (".partial", ".new", ".part")
"""The ends of files that get other names when they are whole."""

Kind = Literal["whole", "piece", "more", "gone"]


@dataclass(frozen=True)
class Change:
    """One, of one file."""

    name: str
    """Within the folder, with forward slashes."""
    kind: Kind
    """`whole`: `content` is all of it, or its last piece; `piece`: there is more to come; `more`: was added to it."""
    content: bytes = b""
    start: int = 0
    """Where a piece begins."""


@dataclass(frozen=True)
class Look:
    """How a file looked."""

    inode: int
    size: int
    changed_ns: int


def listed(root: Path) -> dict[str, Look]:
    """Return the files below a folder, but for those that are not whole yet, by name.

    Raises:
        FileNotFoundError: there is no such folder: that all of it has gone says nothing of each file.
    """
    os.stat(root)
    return dict(_walk(root, ""))


def _walk(folder: Path, prefix: str) -> Iterator[tuple[str, Look]]:
    try:
        entries = list(os.scandir(folder))
    except FileNotFoundError:
        return
    for entry in entries:
        if entry.name.startswith((".", "new-", "probe-")) or entry.name.endswith(PASSING):
            continue
        with suppress(FileNotFoundError):
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(Path(entry.path), f"{prefix}{entry.name}/")
            elif entry.is_file():
                yield prefix + entry.name, _look(entry.stat())


def _look(found: os.stat_result) -> Look:
    return Look(found.st_ino, found.st_size, found.st_mtime_ns)


class Copy:
    """One of two copies of a folder, and what it knows that the other one has. Its methods may be called by threads."""

    def __init__(self, root: Path, tells: Callable[[str], bool]) -> None:
        """`tells`: of which files, by name, the other copy is told; it may tell of all."""
        self._root, self._tells = root, tells
        self._known: dict[str, Look] = {}
        self._sent: dict[str, int] = {}
        """How much of a file that goes in pieces, as it is now known, has gone."""
        self._late: list[Change] = []
        """What this copy has added to a file just before it was told to add to the same one."""
        self._lock = threading.Lock()

    def adopt(self) -> None:
        """Take the other copy to have all that is here."""
        with self._lock:
            self._known = listed(self._root)

    def known(self) -> dict[str, list[int]]:
        """Return what the other copy has, for `restore`; not of files that go in pieces: these begin anew."""
        with self._lock:
            found = {name: look for name, look in self._known.items() if name not in self._sent}
            return {name: [look.inode, look.size, look.changed_ns] for name, look in found.items()}

    def restore(self, known: Mapping[str, Sequence[int]]) -> None:
        """Go on from what another object, of this folder too, has returned by `known`."""
        with self._lock:
            self._known = {name: Look(*look) for name, look in known.items()}

    def pending(self, found: Mapping[str, Look] | None = None) -> list[Change]:
        """Return what the other copy has not been told of; it is taken to know it now.

        One call returns AT_ONCE_BYTES at most, or one change.

        Args:
            found: what `listed` returned, where nothing has been applied since; None: to be listed.

        Raises:
            OSError: the folder cannot be read.
        """
        with self._lock:
            found = listed(self._root) if found is None else found
            changes, self._late = self._late, []
            size = sum(len(change.content) for change in changes)
            for name, look in found.items():
                if size >= AT_ONCE_BYTES:
                    return changes
                if self._tells(name) and (change := self._change(name, look)) is not None:
                    changes.append(change)
                    size += len(change.content)
            for name in [name for name in self._known if name not in found and not (self._root / name).exists()]:
                del self._known[name]
                self._sent.pop(name, None)
                changes.append(Change(name, "gone"))
            return changes

    def _change(self, name: str, look: Look) -> Change | None:
        before, begun = self._known.get(name), self._sent.get(name)
        if before == look and begun is None:
            return None
        try:
            if name.endswith(GROWING):
                return self._more(name, before, look)
            return self._whole(name, before, look, begun or 0)
        except FileNotFoundError:  # it has gone since
            return None

    def _more(self, name: str, before: Look | None, look: Look) -> Change | None:
        start = before.size if before and before.inode == look.inode and before.size <= look.size else 0
        content = _read(self._root / name, start, min(look.size - start, AT_ONCE_BYTES))
        self._known[name] = Look(look.inode, start + len(content), look.changed_ns)
        if before is not None and not start and before.size:  # it began anew
            return Change(name, "whole", content)
        return Change(name, "more", content) if content or before is None else None

    def _whole(self, name: str, before: Look | None, look: Look, begun: int) -> Change:
        start = begun if before == look else 0
        content = _read(self._root / name, start, PIECE_BYTES)
        self._known[name] = look
        if start + len(content) < look.size and content:
            self._sent[name] = start + len(content)
            return Change(name, "piece", content, start)
        self._sent.pop(name, None)
        return Change(name, "whole", content, start)

    def apply(self, changes: Sequence[Change], may_remove: Callable[[str], bool] = lambda name: True) -> None:
        """Put into this copy what the other one has told.

        Args:
            may_remove: of which files, by name, the other one's removal counts here.

        Raises:
            ValueError: a name leads out of the folder; nothing after it was done.
        """
        with self._lock:
            for change in changes:
                if change.name.startswith("/") or ".." in change.name.split("/"):
                    raise ValueError(f"{change.name!r} is no file of the folder")
                if change.kind != "gone" or may_remove(change.name):
                    self._put(change, self._root / change.name)

    def _put(self, change: Change, path: Path) -> None:
        if change.kind == "gone":
            path.unlink(missing_ok=True)
            self._known.pop(change.name, None)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if change.kind == "more":
            self._add(change, path)
            return
        aside = path.with_name(f".{path.name}.told")
        with aside.open("r+b" if change.start else "wb") as file:
            file.seek(change.start)
            file.write(change.content)
            file.truncate()
        if change.kind == "whole":
            self._known[change.name] = _look(aside.stat())
            os.replace(aside, path)

    def _add(self, change: Change, path: Path) -> None:
        before = self._known.get(change.name)
        with path.open("ab") as file:
            file.write(change.content)
            file.flush()
            end, found = file.tell(), os.fstat(file.fileno())
        known, own = before.size if before else 0, end - len(change.content)
        if own > known and self._tells(change.name):  # somebody here has added to it meanwhile
            self._late.append(Change(change.name, "more", _read(path, known, own - known)))
        self._known[change.name] = Look(found.st_ino, end, found.st_mtime_ns)


def _read(path: Path, start: int, most: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(most)
