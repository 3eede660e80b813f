"""Requests wait here for their turn: the fair queue of one model at one gateway, awaited.

As many are let through as the replicas work on at once and a little more, so that the next is at hand when a slot
frees; whatever else there is waits here, where it can be put in order, and not in front of a replica, where it cannot.
A request that would wait past its deadline, as fast as requests leave now, is refused at once instead of at the end.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from serve.fair.queue import FairQueue, Full, Waiting

PACE_S = 10.0
"""Time constant of the rate at which requests leave."""
LEAST_RETRY_S, MOST_RETRY_S = 1, 60


class Busy(Exception):
    """The request cannot be served within its time; `retry_after_s` says when one could be."""

    def __init__(self, reason: str, retry_after_s: int) -> None:
        super().__init__(reason)
        self.reason, self.retry_after_s = reason, retry_after_s


class Pace:
    """How many requests leave a second, over the last while."""

    def __init__(self) -> None:
        self._per_s = 0.0
        self._at: float | None = None
        self._count = 0

    def left(self, now: float) -> None:
        """Take note of one that has left."""
        self._at = now if self._at is None else self._at
        self._count += 1
        passed = now - self._at
        if passed >= PACE_S / 20:
            self._per_s += (self._count / passed - self._per_s) * (1 - math.exp(-passed / PACE_S))
            self._at, self._count = now, 0

    @property
    def per_s(self) -> float | None:
        """Requests a second; None until some have left."""
        return self._per_s or None


@dataclass(frozen=True)
class Turn:
    """A request that was let through; `Turns.end` takes it back."""

    key: str
    priority: int


class Turns:
    """The turns of one model at one gateway. Its methods are called on one event loop."""

    def __init__(self, window: int, most: int, most_per_key: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.window = window
        """Requests that may be on their way or at work at the same time."""
        self.running = 0
        self._clock = clock
        self._queue: FairQueue[asyncio.Future[None]] = FairQueue(most, most_per_key)
        self._pace = Pace()

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    def widen(self, window: int) -> None:
        """Change how many are let through."""
        self.window = window
        self._let_through()

    async def take(self, key: str, priority: int, cost: float, patience_s: float) -> Turn:
        """Wait for a turn, `patience_s` at most. `cost`: tokens that are known to be needed.

        Raises:
            Busy: as many wait as may, or the turn would not come, or did not come, in time.
        """
        wait_s = self._expected_s()
        if wait_s > patience_s:
            raise self._busy(
                f"{len(self._queue)} requests wait, about {wait_s:.0f} s of work, more than this one may wait"
            )
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        try:
            entry = self._queue.push(granted, key, priority, cost, self._clock() + patience_s)
        except Full as full:
            whose = "of this key " if full.whose == "key" else ""
            raise self._busy(f"{full.waiting} requests {whose}wait already") from None
        self._let_through()
        await self._granted(entry, patience_s)
        return Turn(key, priority)

    def charge(self, turn: Turn, tokens: float) -> None:
        """Take generated tokens from the key's share."""
        self._queue.charge(turn.key, turn.priority, tokens)

    def end(self, turn: Turn) -> None:
        """Take a turn back: its request has ended."""
        self._pace.left(self._clock())
        self._give_back(turn.key, turn.priority)

    def retry_after_s(self) -> int:
        """Return when what waits now will have been let through, in whole seconds."""
        wait_s = self._expected_s()
        return LEAST_RETRY_S if not math.isfinite(wait_s) else max(LEAST_RETRY_S, min(MOST_RETRY_S, math.ceil(wait_s)))

    # -- inside ----------------------------------------------------------------------------------------------------

    def _give_back(self, key: str, priority: int) -> None:
        self.running -= 1
        self._queue.end(key, priority)
        self._let_through()

    async def _granted(self, entry: Waiting[asyncio.Future[None]], patience_s: float) -> None:
        timer = asyncio.get_running_loop().call_later(patience_s, self._give_up, entry, patience_s)
        try:
            await entry.request
        except asyncio.CancelledError:
            request = entry.request
            if request.done() and not request.cancelled() and request.exception() is None:
                self._give_back(entry.key, entry.priority)  # it was let through in the moment that its client left
            self._queue.remove(entry)
            raise
        finally:
            timer.cancel()

    def _give_up(self, entry: Waiting[asyncio.Future[None]], patience_s: float) -> None:
        self._queue.remove(entry)
        if not entry.request.done():
            entry.request.set_exception(self._busy(f"its turn did not come within {patience_s:g} s"))

    def _let_through(self) -> None:
        while self.running < self.window and (entry := self._queue.pop()) is not None:
            if entry.request.done():  # its client has just left
                self._queue.end(entry.key, entry.priority)
                continue
            self.running += 1
            entry.request.set_result(None)

    def _expected_s(self) -> float:
        """Return how long a request that comes now would wait."""
        if self.running < self.window and not self._queue:
            return 0.0
        per_s = self._pace.per_s
        return len(self._queue) / per_s if per_s else 0.0

    def _busy(self, reason: str) -> Busy:
        return Busy(reason, self.retry_after_s())
