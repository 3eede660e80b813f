"""Find a rank that hangs, from inside: whatever the backend, and even if no Python code can run any more.

Every moment of a rank's life has a limit: a step follows the steps before it, an evaluation the evaluations before it,
and what has not been measured yet may take `failures.hang_after_s`. Three timers guard it, none of which needs the one
before to work:

    limit                  a thread in C (`faulthandler`) writes the Python stacks of all threads to a file
    limit + GRACE_S        a Python thread ends the process, so that the group is started again; where the machine gave
                           the thread in C no time meanwhile, it writes the stacks before
    limit + GRACE_S + …    the kernel ends it (SIGALRM): a rank that holds Python's lock runs no thread of Python

A rank that the kernel cannot end either, since it was stopped (SIGSTOP) or blocks the signal, gives no sign of life: at
each new limit a rank writes its pulse, and jobs/driver/pulse.py ends those that are overdue, from outside.

Ranks that only wait for the one that hangs do the same at the same moment: all stacks are there.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import statistics
import threading
import time
from collections import deque
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

FACTOR = 3.0
MARGIN_S = 8.0
LONGEST_S = 1800.0
"""For what has not been measured yet, and for what may always take long."""
GRACE_S = 1.0
KERNEL_S = 2.0
"""So long after the Python thread should have ended the process, the kernel does."""
EXIT_CODE = 86
REARM_S = 1.0
STEP = "step"


def limit(lengths: Collection[float], longest_s: float, margin_s: float = MARGIN_S) -> float:
    """Return how long something may take that took so long before, in seconds. Pure."""
    return min(longest_s, FACTOR * statistics.median(lengths) + margin_s) if lengths else longest_s


class Pulse:
    """A rank's sign of life, as a file: the node and the process, a count, and how long it may stay the same."""

    def __init__(self, path: Path, node: str) -> None:
        self._path, self._node, self._count = path, node, 0

    def beat(self, allowed_s: float) -> None:
        """Write it anew. A storage that does not take it costs the sign, not the run."""
        self._count += 1
        with suppress(OSError):
            self._path.write_text(f"{self._node} {os.getpid()} {self._count} {allowed_s:.3f}\n", encoding="ascii")

    def end(self) -> None:
        """Take it away: nobody waits for it any more."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)


class Watchdog:
    """One rank's. `stacks` is the file that appears when it hangs, `pulse` its sign of life for the driver."""

    def __init__(
        self, stacks: Path, longest_s: float = LONGEST_S, pulse: Pulse | None = None, margin_s: float = MARGIN_S
    ) -> None:
        """Begin; `margin_s`: how much longer than three of those before a step may take."""
        stacks.parent.mkdir(parents=True, exist_ok=True)
        self._pulse = pulse
        self._path = stacks
        self._file: IO[str] | None = stacks.open("w")
        self._longest_s, self._margin_s = longest_s, margin_s
        self._lengths: dict[str, deque[float]] = {}
        self._within: list[float] = []
        """The limits of what goes on that is no step, the innermost last."""
        self._deadline = 0.0
        self._armed_at = 0.0
        self._stopped = threading.Event()
        self._arm(self._longest_s)
        threading.Thread(target=self._end_when_due, name="tandem-watchdog", daemon=True).start()

    def step(self, seconds: float) -> None:
        """A step of this length is done, and another begins: it has FACTOR times the median, and a margin."""
        self._measured(STEP).append(seconds)
        allowed = limit(self._measured(STEP), self._longest_s, self._margin_s)
        if time.monotonic() - self._armed_at >= min(REARM_S, allowed / 2):
            self._arm(allowed)

    @contextmanager
    def during(self, what: str, *, learns: bool = True) -> Iterator[None]:
        """Allow for what is no step; when it is over, what it is a part of goes on, or the next step begins.

        Args:
            what: of the same name, the lengths decide the limit.
            learns: False for what depends on more than itself, as on a storage: it may always take the longest.
        """
        began = time.monotonic()
        self._within.append(limit(self._measured(what), self._longest_s) if learns else self._longest_s)
        self._arm(self._within[-1])
        try:
            yield
        finally:
            self._measured(what).append(time.monotonic() - began)
            self._within.pop()
            step_s = limit(self._measured(STEP), self._longest_s, self._margin_s)
            self._arm(self._within[-1] if self._within else step_s)

    def stop(self) -> None:
        """Disarm, and remove the file if nothing was written to it."""
        self._stopped.set()
        if self._pulse is not None:
            self._pulse.end()
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        if self._file is not None:
            self._file.close()
            self._file = None
            if self._path.stat().st_size == 0:
                self._path.unlink()

    def _measured(self, what: str) -> deque[float]:
        return self._lengths.setdefault(what, deque(maxlen=64))

    def _arm(self, allowed_s: float) -> None:
        if self._file is None:
            return
        self._armed_at = time.monotonic()
        self._deadline = self._armed_at + allowed_s
        faulthandler.dump_traceback_later(allowed_s, file=self._file)
        # Nobody handles SIGALRM here, so it ends the process; a timer of the kernel needs no thread of ours.
        signal.setitimer(signal.ITIMER_REAL, allowed_s + GRACE_S + KERNEL_S)
        if self._pulse is not None:
            self._pulse.beat(allowed_s)

    def _end_when_due(self) -> None:
        while not self._stopped.wait(0.5):
            if time.monotonic() > self._deadline + GRACE_S:
                self._leave_stacks()
                os._exit(EXIT_CODE)

    def _leave_stacks(self) -> None:
        """Write the stacks unless they are there. A process that had no time at all wakes with both timers overdue."""
        faulthandler.cancel_dump_traceback_later()  # waits until the thread in C has written what it began
        with suppress(OSError, ValueError):  # no room, or closed by `stop` just now
            if self._file is not None and os.fstat(self._file.fileno()).st_size == 0:
                faulthandler.dump_traceback(file=self._file)
