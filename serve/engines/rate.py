"""How many tokens an engine generated over the last few seconds."""

from __future__ import annotations

import threading
import time
from collections import deque

WINDOW_S = 5.0


class Rate:
    """Counts from one thread or several."""

    def __init__(self) -> None:
        self._counts: deque[tuple[float, int]] = deque()
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self._counts.append((time.monotonic(), count))
            self._forget()

    def per_second(self) -> float:
        with self._lock:
            self._forget()
            return sum(count for _, count in self._counts) / WINDOW_S

    def _forget(self) -> None:
        while self._counts and self._counts[0][0] < time.monotonic() - WINDOW_S:
            self._counts.popleft()
