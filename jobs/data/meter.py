"""How far a phase of a preparation is, in rows and bytes: told here, and by the processes that work for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from jobs.data.opening import EVERY_S, MEGABYTE, OnProgress
from jobs.data.unfinished import write

Pulse = Callable[[int, int], None]
"""Called with rows and bytes that have been done since the last time."""


class Told(Protocol):
    """What a process that does a part is given to tell how far it is."""

    def __call__(self, rows: int, size: int) -> None:
        """Count what has been done since the last time, and tell it now and then."""

    def write(self) -> None:
        """Tell what was counted."""


class Pulses(Protocol):
    """By which way others tell how far the parts are that they do, by their names."""

    def of(self, name: str) -> Told:
        """Return what is to be told of a part; any process can be sent it."""

    def read(self, names: Iterable[str]) -> dict[str, tuple[int, int]]:
        """Return rows and bytes of those parts of which something was told."""

    def forget(self, name: str) -> None:
        """Take note that a part is done."""


class Meter:
    """What has been done of a phase, by all that work on it."""

    def __init__(
        self, phase: str, total: int, on_progress: OnProgress, near: Pulses, far: Pulses | None = None
    ) -> None:
        """Take the bytes that there are in all, and the ways by which others tell what they have done.

        Args:
            near: that of processes which see this one's files.
            far: that of tasks which may not; None: they do.
        """
        self._phase, self._total, self._on_progress = phase, total, on_progress
        self._near, self._far = near, far or near
        self._rows, self._bytes = 0, 0
        self._under_way: dict[str, tuple[int, int]] = {}
        self._shown, self._next = -1, 0.0
        self._show(0, 0)

    def add(self, rows: int, size: int) -> None:
        """Count what was done here."""
        self._rows, self._bytes = self._rows + rows, self._bytes + size
        self._show(self._rows, self._bytes)

    def pulse(self, name: str, *, near: bool) -> Told:
        """Return what a process that does a part is to tell how far it is; `near`: it sees this one's files."""
        self._under_way[name] = 0, 0
        return (self._near if near else self._far).of(f"{self._phase}-{name}")

    def look(self) -> None:
        """Look how far others are."""
        before = dict(self._under_way)
        keys = [f"{self._phase}-{name}" for name in before]
        told = {key: value for way in {self._near, self._far} for key, value in way.read(keys).items()}
        self._under_way |= {name: told[key] for name in before if (key := f"{self._phase}-{name}") in told}
        if self._under_way != before:
            parts = self._under_way.values()
            self._show(self._rows + sum(rows for rows, _ in parts), self._bytes + sum(size for _, size in parts))

    def settle(self, name: str) -> None:
        """Count a part that was done elsewhere as done."""
        self.look()
        rows, size = self._under_way.pop(name, (0, 0))
        for way in {self._near, self._far}:
            way.forget(f"{self._phase}-{name}")
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


class InFolder:
    """Pulses are files of a folder that all see."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def of(self, name: str) -> FilePulse:
        """See Pulses."""
        return FilePulse(self._folder / name)

    def read(self, names: Iterable[str]) -> dict[str, tuple[int, int]]:
        """See Pulses."""
        found = {}
        for name in names:
            with suppress(OSError, ValueError):
                rows, size = (self._folder / name).read_text(encoding="ascii").split()
                found[name] = int(rows), int(size)
        return found

    def forget(self, name: str) -> None:
        """See Pulses."""
        (self._folder / name).unlink(missing_ok=True)


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


class InActor:
    """Pulses go to an actor of the cluster, where nodes share no folder: it ends with this object."""

    def __init__(self) -> None:
        import ray

        self._actor = ray.remote(num_cpus=0, max_restarts=-1)(_Board).remote()

    def of(self, name: str) -> ActorPulse:
        """See Pulses."""
        return ActorPulse(self._actor, name)

    def read(self, names: Iterable[str]) -> dict[str, tuple[int, int]]:
        """See Pulses; what is not answered at once is not known."""
        import ray

        try:
            found: dict[str, tuple[int, int]] = ray.get(self._actor.read.remote(list(names)), timeout=EVERY_S)
        except ray.exceptions.RayError:
            return {}
        return found

    def forget(self, name: str) -> None:
        """See Pulses."""
        self._actor.forget.remote(name)


class _Board:
    """The actor."""

    def __init__(self) -> None:
        self._told: dict[str, tuple[int, int]] = {}

    def tell(self, name: str, rows: int, size: int) -> None:
        self._told[name] = rows, size

    def read(self, names: list[str]) -> dict[str, tuple[int, int]]:
        return {name: self._told[name] for name in names if name in self._told}

    def forget(self, name: str) -> None:
        self._told.pop(name, None)


class ActorPulse:
    """Tells an actor how far a part is. Any process of the cluster can be sent it."""

    def __init__(self, actor: Any, name: str) -> None:
        self._actor, self._name = actor, name
        self._rows, self._bytes, self._next = 0, 0, 0.0

    def __call__(self, rows: int, size: int) -> None:
        """Count, and tell now and then."""
        self._rows, self._bytes = self._rows + rows, self._bytes + size
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + EVERY_S
            self._actor.tell.remote(self._name, self._rows, self._bytes)

    def write(self) -> None:
        """Tell what was counted; it has arrived when this returns, unless the actor is lost."""
        import ray

        with suppress(ray.exceptions.RayError):  # the work goes on, whoever looks at it
            ray.get(self._actor.tell.remote(self._name, self._rows, self._bytes), timeout=EVERY_S)


def _megabytes(size: int) -> int:
    return max(1, -(-size // MEGABYTE))
