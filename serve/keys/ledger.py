"""What each key has used, in a file that outlives the process: counted before it is sent, lost by no kill.

A gateway replica counts into shared memory that is a file's pages (mmap): one 8-byte store a count, no system call. A
process that is killed loses nothing, since the kernel owns the pages; whoever finds the file without its owner (the
lock on it is free) settles it. What a lost machine takes with it is what was counted since the last flush.

The file is a row of slots of 256 bytes: three counters (requests, tokens of prompts, generated tokens; native 64-bit),
the length of the name, and the name: JSON of [key, model, day]. A slot exists once its length is not zero, which is
written last.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

SLOT_BYTES = 256
_WORDS = SLOT_BYTES // 8
_NAME_AT = 4 * 8
LONGEST_NAME = SLOT_BYTES - _NAME_AT
_GROW_SLOTS = 256
SUFFIX = ".ledger"


@dataclass(frozen=True)
class Used:
    """What one key has used of one model on one day (UTC)."""

    key: str
    model: str
    day: date
    requests: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of prompts and answers together."""
        return self.prompt_tokens + self.generated_tokens


class Entry:
    """The counters of one slot."""

    __slots__ = ("_at", "_ledger")

    def __init__(self, ledger: Ledger, slot: int) -> None:
        self._ledger = ledger
        self._at = slot * _WORDS

    def add(self, requests: int = 0, prompt_tokens: int = 0, generated_tokens: int = 0) -> None:
        """Count. Called on the gateway's event loop only."""
        words, at = self._ledger.words, self._at
        words[at] += requests
        words[at + 1] += prompt_tokens
        words[at + 2] += generated_tokens
        self._ledger.changed.add(at // _WORDS)


class Ledger:
    """The file of one process's counts. It is locked while the process lives."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.id = uuid.uuid4().hex
        self.path = folder / f"{self.id}{SUFFIX}"
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._file, fcntl.LOCK_EX)
        self._slots: dict[tuple[str, str, date], Entry] = {}
        self.changed: set[int] = set()
        """Slots that were counted into since `flushable` was asked."""
        self._map(_GROW_SLOTS)

    def entry(self, key: str, model: str, day: date) -> Entry:
        """Return the counters of a key, a model and a day; they begin at zero."""
        name = (key, model, day)
        if name not in self._slots:
            self._slots[name] = self._new_slot(name)
        return self._slots[name]

    def flushable(self) -> list[Used]:
        """Return the totals of every slot that has changed since the last call."""
        changed, self.changed = sorted(self.changed), set()
        return [used for slot in changed if (used := _slot(self._memory, slot))]

    def keep_all(self) -> None:
        """Let the next `flushable` return every slot."""
        self.changed.update(range(len(self._slots)))

    def close(self) -> None:
        """Let go of the file; it stays for whoever settles it."""
        self.words.release()
        self._memory.close()
        os.close(self._file)

    def _new_slot(self, name: tuple[str, str, date]) -> Entry:
        text = json.dumps([name[0], name[1], name[2].isoformat()], ensure_ascii=False).encode()
        if len(text) > LONGEST_NAME:
            raise ValueError(f"{name[0]!r} and {name[1]!r} are too long for the ledger")
        slot = len(self._slots)
        if (slot + 1) * SLOT_BYTES > len(self._memory):
            self.words.release()
            self._memory.close()
            self._map(2 * slot)
        start = slot * SLOT_BYTES
        self._memory[start + _NAME_AT : start + _NAME_AT + len(text)] = text
        self.words[slot * _WORDS + 3] = len(text)
        return Entry(self, slot)

    def _map(self, slots: int) -> None:
        os.ftruncate(self._file, slots * SLOT_BYTES)
        self._memory = mmap.mmap(self._file, slots * SLOT_BYTES)
        self.words = memoryview(self._memory).cast("Q")
        """The file as 64-bit words."""


@dataclass(frozen=True)
class Orphan:
    """A ledger whose process has ended, locked for the one who settles it."""

    id: str
    path: Path
    used: list[Used]


def orphans(folder: Path) -> Iterator[Orphan]:
    """Yield the ledgers in a folder that no process holds. Each stays locked until the next is asked for."""
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        try:
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # another has settled it
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Settled by another between our open and our lock, or just made and not locked yet.
            if os.fstat(file).st_nlink and os.fstat(file).st_size:
                yield Orphan(path.stem, path, read(path))
        except BlockingIOError:
            continue
        finally:
            os.close(file)


def read(path: Path) -> list[Used]:
    """Return what a ledger's file holds."""
    content = path.read_bytes()
    return [used for slot in range(len(content) // SLOT_BYTES) if (used := _slot(content, slot))]


def _slot(content: bytes | mmap.mmap, slot: int) -> Used | None:
    start = slot * SLOT_BYTES
    words = memoryview(content[start : start + SLOT_BYTES]).cast("Q")
    if not words[3]:
        return None
    name = content[start + _NAME_AT : start + _NAME_AT + words[3]]
    key, model, day = json.loads(name)
    return Used(key, model, date.fromisoformat(day), words[0], words[1], words[2])
