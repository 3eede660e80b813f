"""What else runs on the machine while something is measured: the CPU time of all processes but those that compute."""

from __future__ import annotations

import threading
import time
from types import TracebackType

import psutil

INTERVAL_S = 2.0


class Others:
    """Notes the CPU seconds of every process all the while; a context manager."""

    def __init__(self) -> None:
        self._seen: list[tuple[float, dict[tuple[int, float], float]]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Others:
        """Begin."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End."""
        self._over.set()
        self._thread.join()

    def percent(self, start: float, end: float, computing: int) -> float:
        """Return what others took between two times (seconds since the epoch), in percent of one core.

        Args:
            computing: so many processes, those that took most, are not others.
        """
        within = [each for each in self._seen if start <= each[0] <= end]
        if len(within) < 2:
            return float("nan")
        (began, before), (ended, after) = within[0], within[-1]
        taken = sorted(seconds - before.get(process, 0.0) for process, seconds in after.items())
        return 100 * sum(taken[:-computing]) / (ended - began)

    def _watch(self) -> None:
        while not self._over.wait(INTERVAL_S):
            self._seen.append((time.time(), _seconds()))


def _seconds() -> dict[tuple[int, float], float]:
    found = {}
    for process in psutil.process_iter(["pid", "create_time", "cpu_times"]):
        times = process.info["cpu_times"]
        if times is not None:
            found[process.info["pid"], process.info["create_time"]] = times.user + times.system
    return found
