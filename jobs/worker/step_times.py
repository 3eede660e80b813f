"""Where a step's time goes: forward, backward, the sum of the losses over the ranks, the optimizer.

On a GPU a call returns before its work is done. Events in the device's own order say when it was, and are read once
the device has passed them: nothing waits for them, and a step's times may be known only after the step behind it.

What is communicated where it is computed counts as part of it: gradients are reduced within the backward pass, weights
of ZeRO stage 3 are gathered within both passes, updated weights of stages 1 and 2 within the optimizer's step. So
`communication_s` lies within the others: what this rank spends in calls of collectives, and in waits for those that it
has begun before. On a CPU nothing else goes on meanwhile. On a GPU it is how long they keep the stream that they are
called on, which may be one of their own beside that of the arithmetic.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """Marks moments, and tells later how far they were apart."""

    def mark(self) -> Any:
        """Return this moment; cheap, and waits for nothing."""

    def passed(self, moment: Any) -> bool:
        """Tell whether a moment has come."""

    def seconds(self, begin: Any, end: Any) -> float:
        """Return the seconds between two moments that have come."""


class HostClock:
    """Of work that is done when its call returns."""

    def mark(self) -> float:
        """Return this moment in seconds."""
        return time.perf_counter()

    def passed(self, moment: float) -> bool:
        """Return True."""
        return True

    def seconds(self, begin: float, end: float) -> float:
        """Return the difference."""
        return end - begin


class DeviceClock:
    """Of work that a GPU does later, in the order of its current stream."""

    def mark(self) -> torch.cuda.Event:
        """Record an event behind what was launched until now."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def passed(self, moment: torch.cuda.Event) -> bool:
        """Tell whether the device has come there."""
        return moment.query()

    def seconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Return what the device took between two events."""
        return begin.elapsed_time(end) / 1000


def clock(device: torch.device) -> Clock:
    """Return the clock of a device."""
    return DeviceClock() if device.type == "cuda" else HostClock()


class StepTimes:
    """The parts of each step, added up over its micro-batches."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._parts: list[tuple[str, Any, Any]] = []
        self._ended: deque[tuple[int, list[tuple[str, Any, Any]]]] = deque()

    @contextmanager
    def during(self, part: str) -> Iterator[None]:
        """Count what goes on meanwhile as `part` of this step."""
        begin = self._clock.mark()
        yield
        self.add(part, begin)

    def mark(self) -> Any:
        """Return this moment."""
        return self._clock.mark()

    def add(self, part: str, begin: Any) -> None:
        """Count the time from a moment until now as `part` of this step."""
        self._parts.append((part, begin, self._clock.mark()))

    def end(self, step: int) -> list[tuple[int, dict[str, float]]]:
        """End a step. Return (step, seconds of each part as `PART_s`) of all that are known by now and not told yet."""
        self._ended.append((step, self._parts))
        self._parts = []
        known = []
        while self._ended and all(self._clock.passed(end) for _, _, end in self._ended[0][1]):
            ended, parts = self._ended.popleft()
            known.append((ended, self._sums(parts)))
        return known

    def _sums(self, parts: list[tuple[str, Any, Any]]) -> dict[str, float]:
        sums: dict[str, float] = {}
        for part, begin, end in parts:
            key = f"{part}_s"
            sums[key] = sums.get(key, 0.0) + self._clock.seconds(begin, end)
        return sums
