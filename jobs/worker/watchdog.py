"""Find a rank that hangs, from inside: whatever the backend, and even if no Python code can run any more.

Every rank arms a timer of `faulthandler` at each step: a thread in C, which needs no interpreter lock. When no step is
finished in time, it writes the Python stacks of all threads to a file; then the process ends itself, so that the group
is started again. Ranks that only wait for the one that hangs do the same at the same moment: all stacks are there.
"""

from __future__ import annotations

import faulthandler
import os
import statistics
import threading
import time
from collections import deque
from pathlib import Path
from typing import IO

FACTOR = 3.0
MARGIN_S = 8.0
LONGEST_S = 1800.0
"""For what is no step: setting up, evaluating, exporting."""
GRACE_S = 1.0
EXIT_CODE = 86
REARM_S = 1.0


class Watchdog:
    """One rank's. `stacks` is the file that appears when it hangs."""

    def __init__(self, stacks: Path, longest_s: float = LONGEST_S) -> None:
        stacks.parent.mkdir(parents=True, exist_ok=True)
        self._path = stacks
        self._file: IO[str] | None = stacks.open("w")
        self._longest_s = longest_s
        self._steps: deque[float] = deque(maxlen=64)
        self._deadline = 0.0
        self._armed_at = 0.0
        self._for_long = True
        self._stopped = threading.Event()
        self.allow()
        threading.Thread(target=self._end_when_due, name="tandem-watchdog", daemon=True).start()

    def step(self, seconds: float) -> None:
        """A step of this length is done; the next one has FACTOR times the median, and a margin."""
        self._steps.append(seconds)
        limit = min(self._longest_s, FACTOR * statistics.median(self._steps) + MARGIN_S)
        if self._for_long or time.monotonic() - self._armed_at >= min(REARM_S, limit / 2):
            self._for_long = False
            self._arm(limit)

    def allow(self) -> None:
        """Whatever comes now may take as long as anything may that is no step; the next step ends that."""
        self._for_long = True
        self._arm(self._longest_s)

    def _arm(self, limit: float) -> None:
        assert self._file is not None
        self._armed_at = time.monotonic()
        self._deadline = self._armed_at + limit
        faulthandler.dump_traceback_later(limit, file=self._file)

    def stop(self) -> None:
        """Disarm, and remove the file if nothing was written to it."""
        self._stopped.set()
        faulthandler.cancel_dump_traceback_later()
        if self._file is not None:
            self._file.close()
            self._file = None
            if self._path.stat().st_size == 0:
                self._path.unlink()

    def _end_when_due(self) -> None:
        while not self._stopped.wait(0.5):
            if time.monotonic() > self._deadline + GRACE_S:
                os._exit(EXIT_CODE)
