"""Find a preparation of data that hangs in the driver: a pipe as a file, a storage that blocks, a task without an end.

What counts as going on: progress that is reported, or READ_BYTES read meanwhile. After `failures.hang_after_s` without,

    limit                 the kernel's alarm: the main thread, wherever its Python is, ends the job with what it was at
    limit + GRACE_S       a Python thread ends the process, where the main thread is in code that sees no signal
    limit + 2 * GRACE_S   a thread in C (`faulthandler`) does, where Python's lock is held for ever

Each leaves the Python stacks of all threads in the run's folder; in the last two cases the guard ends the run.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO

import psutil

from cluster.errors import UserError
from jobs import progress

ATTEMPT = "preparation"
"""What its stacks are called among those of the workers."""
READ_BYTES = 16 << 20
"""So much is read by reading data; what Ray and the driver's own threads read for themselves is far less."""
GRACE_S = 5.0
POLL_S = 1.0
WAY_OUT = "mend that, or set failures.hang_after_s higher, and submit the same spec again"


class PreparationHung(UserError):
    """The preparation of the data did nothing for longer than it may."""

    exit_code = 1


class _Overdue(BaseException):
    """Raised in the main thread; no `except Exception` round a bad row may take it for that row's fault."""


class Standstill:
    """The watch over one preparation, for the main thread of a process."""

    def __init__(self, stacks: Path, longest_s: float) -> None:
        """Take the file that appears where it hangs, and how long nothing may happen."""
        self._path, self._longest_s = stacks, longest_s
        self._file: IO[str] | None = None
        self._deadline = 0.0
        self._read = 0
        self._ended = threading.Event()

    def beat(self) -> None:
        """Say that it goes on."""
        self._deadline = time.monotonic() + self._longest_s

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch what goes on within.

        Raises:
            PreparationHung: it did nothing for too long.
        """
        before = signal.signal(signal.SIGALRM, self._on_alarm)
        self._file = self._path.open("w", encoding="utf-8")
        self._read = read_bytes()
        self.beat()
        self._arm()
        watch = threading.Thread(target=self._watch, name="tandem-standstill", daemon=True)
        watch.start()
        try:
            yield
        except _Overdue as error:
            raise PreparationHung(str(error)) from None
        finally:
            self._ended.set()
            watch.join()
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.cancel_dump_traceback_later()
            signal.signal(signal.SIGALRM, before)
            self._file.close()
            if not self._path.stat().st_size:
                self._path.unlink()

    def _watch(self) -> None:
        armed_for = self._deadline
        while not self._ended.wait(min(POLL_S, self._longest_s / 4)):
            if (read := read_bytes()) - self._read >= READ_BYTES:
                self.beat()
            if self._deadline != armed_for:
                self._read, armed_for = read, self._deadline
                self._arm()
            elif time.monotonic() > self._deadline + GRACE_S:
                self._end()

    def _arm(self) -> None:
        assert self._file is not None
        left_s = max(0.001, self._deadline - time.monotonic())
        signal.setitimer(signal.ITIMER_REAL, left_s)
        faulthandler.dump_traceback_later(left_s + 2 * GRACE_S, file=self._file, exit=True)

    def _on_alarm(self, signum: int, frame: FrameType | None) -> None:
        """End what the main thread is at, unless it went on meanwhile."""
        assert self._file is not None
        if time.monotonic() < self._deadline:
            return  # the watching thread sets the alarm anew
        faulthandler.dump_traceback(file=self._file)
        raise _Overdue(sentence(self._longest_s, place(frame)))

    def _end(self) -> None:
        assert self._file is not None
        with suppress(OSError):
            faulthandler.dump_traceback(file=self._file)
        progress.say(f"error: {sentence(self._longest_s, None)}")
        os._exit(PreparationHung.exit_code)


def sentence(longest_s: float, at: str | None) -> str:
    """Say what happened, and the way out. Pure."""
    where = f", in {at}" if at else ""
    return (
        f"the preparation of the data hung: nothing was read and nothing was done for {longest_s:g} s{where}; its "
        f"stacks are in the run's stacks/; {WAY_OUT}"
    )


def place(frame: FrameType | None) -> str | None:
    """Return where a frame is: function, file and line."""
    return f"{frame.f_code.co_name} ({frame.f_code.co_filename}, line {frame.f_lineno})" if frame else None


def read_bytes() -> int:
    """Return how much this process has read since it began, from whatever; 0 where the system does not count it."""
    with suppress(psutil.Error, AttributeError, OSError):
        return int(psutil.Process().io_counters().read_chars)
    return 0
