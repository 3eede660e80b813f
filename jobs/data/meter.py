"""How far a phase of a preparation is, in rows and bytes: told here, and by the processes that work for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from jobs.data.opening import EVERY_S, MEGABYTE, OnProgress
from jobs.data.unfinished import write

Pulse = Callable[[int, int], None]
"""Called with rows and bytes that have been done since the last time."""


class Meter:
    """What has been done of a phase, by all that work on it."""

    def __init__(self, phase: str, total: int, on_progress: OnProgress, folder: Path) -> None:
        """Take the bytes that there are in all, and where others leave what they have done."""
        self._phase, self._total, self._on_progress, self._folder = phase, total, on_progress, folder
        self._rows, self._bytes = 0, 0
        self._under_way: dict[str, tuple[int, int]] = {}
        self._shown, self._next = -1, 0.0
        self._show(0, 0)

    def add(self, rows: int, size: int) -> None:
        """Count what was done here."""
        self._rows, self._bytes = self._rows + rows, self._bytes + size
        self._show(self._rows, self._bytes)

    def pulse(self, name: str) -> FilePulse:
        """Return what a process that does the part `name` is to tell how far it is."""
        self._under_way[name] = 0, 0
        return FilePulse(self._folder / f"{self._phase}-{name}")

    def look(self) -> None:
        """Look how far others are."""
        before = dict(self._under_way)
        for name in before:
            with suppress(OSError, ValueError):
                rows, size = (self._folder / f"{self._phase}-{name}").read_text(encoding="ascii").split()
                self._under_way[name] = int(rows), int(size)
        if self._under_way != before:
            parts = self._under_way.values()
            self._show(self._rows + sum(rows for rows, _ in parts), self._bytes + sum(size for _, size in parts))

    def settle(self, name: str) -> None:
        """Count a part that was done elsewhere as done."""
        self.look()
        rows, size = self._under_way.pop(name, (0, 0))
        (self._folder / f"{self._phase}-{name}").unlink(missing_ok=True)
        self._rows, self._bytes = self._rows + rows, self._bytes + size

    def end(self) -> None:
        """Say that the phase is over."""
        total = _megabytes(self._total)
        self._on_progress(self._phase, total, total, {"rows": self._rows, "bytes": self._bytes})

    def _show(self, rows: int, size: int) -> None:
        total = _megabytes(self._total)
        done, now = min(size // MEGABYTE, total - 1), time.monotonic()
        if done == self._shown and now < self._next:
            return
        self._shown, self._next = done, now + EVERY_S
        self._on_progress(self._phase, done, total, {"rows": rows, "bytes": size})


class FilePulse:
    """Tells through a file how far a part is. Any process can be sent it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows, self._bytes, self._next = 0, 0, 0.0

    def __call__(self, rows: int, size: int) -> None:
        """Count, and write now and then."""
        self._rows, self._bytes = self._rows + rows, self._bytes + size
        if time.monotonic() >= self._next:
            self.write()

    def write(self) -> None:
        """Write what was counted."""
        self._next = time.monotonic() + EVERY_S
        with suppress(OSError):  # the work goes on, whoever looks at it
            write(self._path, f"{self._rows} {self._bytes}".encode())


def _megabytes(size: int) -> int:
    return max(1, -(-size // MEGABYTE))
