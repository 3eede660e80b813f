"""Files are opened side by side, and it is told how far that is: for its digest each is read from end to end.

    with opening.told(on_progress):                    while a job's data is opened
        sources = opening.each(open_one, paths)        on threads where there is much; the results in order
            opening.count(len(chunk))                  by whoever reads a file, in `open_one`

Threads do: reading and digesting leave Python's lock alone.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from typing import Any, TypeVar

from jobs.data.compression import size_of
from jobs.data.remote import Place
from jobs.data.spread import cpus

OnProgress = Callable[[str, int, int, Mapping[str, float]], None]
"""Called with (phase, done, total, counts): done and total in megabytes, counts of rows and bytes."""
EVERY_S = 1.0
MEGABYTE = 1_000_000
PHASE = "digest"
SMALL_BYTES = 64 << 20
"""Files that are no more than this together are opened one after the other, and nothing is told."""
THREADS = 16
"""At most; chosen, not measured."""
Made = TypeVar("Made")


class _GivenUp(BaseException):
    """Ends the reading of files that nobody waits for any more; no `except Exception` may take it for an error."""


class _Count:
    """What has been read of some files, by several threads."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes, self._read = sizes, [0] * len(sizes)
        self.given_up = False

    def add(self, number: int, size: int) -> None:
        """Count bytes of one file."""
        if self.given_up:
            raise _GivenUp
        self._read[number] += size

    def end(self, number: int) -> None:
        """Count a file as read: of one that is known from an earlier start nothing was."""
        self._read[number] = self._sizes[number]

    @property
    def done(self) -> int:
        """The bytes that are read."""
        return sum(map(min, self._read, self._sizes))


_TOLD: ContextVar[OnProgress | None] = ContextVar("who is told how far files are read", default=None)
_COUNTED: ContextVar[Callable[[int], None] | None] = ContextVar("what counts the bytes of this file", default=None)


@contextmanager
def told(on_progress: OnProgress) -> Iterator[None]:
    """Tell how far the files are that are opened meanwhile."""
    token = _TOLD.set(on_progress)
    try:
        yield
    finally:
        _TOLD.reset(token)


def count(size: int) -> None:
    """Note that so many bytes more of the file have been read that is being opened."""
    add = _COUNTED.get()
    if add is not None:
        add(size)


def each(work: Callable[[Any], Made], files: Sequence[Place]) -> list[Made]:
    """Return what `work` makes of each file, in order.

    Raises:
        what `work` raises: the first in the order of the files, of those that failed before the rest was given up.
    """
    sizes = [_size(file) for file in files]
    if sum(sizes) <= SMALL_BYTES:
        return [work(file) for file in files]
    counted, made = _Count(sizes), dict[int, Made | BaseException]()
    waiting, ended = queue.SimpleQueue[int](), queue.SimpleQueue[int]()
    for number in range(len(files)):
        waiting.put(number)

    def open_one(number: int) -> Made:
        _COUNTED.set(lambda size: counted.add(number, size))
        return work(files[number])

    def open_some() -> None:
        while not counted.given_up:
            try:
                number = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                made[number] = contexts[number].run(open_one, number)
            except _GivenUp:
                return
            except BaseException as error:  # raised where it is waited for
                made[number] = error
            counted.end(number)
            ended.put(number)

    contexts = [copy_context() for _ in files]
    try:
        for number in range(min(THREADS, max(2, cpus()), len(files))):
            threading.Thread(target=open_some, name=f"tandem-open-{number}", daemon=True).start()
        _wait(counted, made, ended, len(files), sum(sizes))
    finally:
        counted.given_up = True
    found = list[Made]()
    for number in sorted(made):
        each_made = made[number]
        if isinstance(each_made, BaseException):
            raise each_made
        found.append(each_made)
    return found


def _wait(counted: _Count, made: dict[int, Any], ended: queue.SimpleQueue[int], files: int, total: int) -> None:
    """Wait until so many files are opened, or one has failed; tell it whenever more is read."""
    on_progress, shown, said_at = _TOLD.get(), -1, time.monotonic()
    while files:
        try:
            number = ended.get(timeout=EVERY_S)
        except queue.Empty:
            pass
        else:
            if isinstance(made[number], BaseException):
                return
            files -= 1
        now = time.monotonic()
        if on_progress and (now >= said_at + EVERY_S or not files):  # to ask is to add up all files
            said_at, done = now, counted.done
            if done > shown:
                on_progress(PHASE, done // MEGABYTE, total // MEGABYTE, {"bytes": done})
                shown = done


def _size(file: Place) -> int:
    """Return the bytes of a file; none of one that cannot be asked, which opening it says."""
    try:
        return size_of(file)
    except OSError:
        return 0
