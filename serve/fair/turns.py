"""Requests wait here for their turn: the fair queue of one model at one gateway, awaited.

As many are let through as the replicas work on at once and a little more, so that the next is at hand when a slot
frees; whatever else there is waits here, where it can be put in order, and not in front of a replica, where it cannot.
A request for several texts takes as many places, since each of them is a call to a replica.

Where several keys have asked for something of late, a part of the slots is kept for those that have used less than
their share: a key with little to do finds a free slot then, and does not wait until one with much to do leaves one.

A request that would wait past its deadline, by what goes before it and as fast as requests leave, is refused at once
instead of at the end. Where no more may wait, the key with most of them in the worst class gives a place up.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from serve.fair.queue import QUANTUM, FairQueue, Full, Waiting
from serve.fair.recent import RecentKeys
from serve.fair.reserve import Reserve

PACE_S = 10.0
"""Time constant of the rate at which requests leave."""
LEAST_SEEN = 5
"""Requests that must have left before it is believed; until then none is refused for how long it would wait."""
SAVED_S, LEAST_SAVED = 2.0, 2 * QUANTUM
"""A key may save up what the model does in so many seconds, or so many tokens if more: such a burst goes first."""
MOST_RUNNING = 0.6
"""Part of the slots; a key that runs so many texts gets none of those that are kept, whatever it is owed."""
RECENT_S = 60.0
"""A key that has asked for nothing for so long uses the model no more."""
LEAST_RETRY_S, MOST_RETRY_S = 1, 60


class Busy(Exception):
    """The request cannot be served within its time; `retry_after_s` says when one could be."""

    def __init__(self, reason: str, retry_after_s: int) -> None:
        super().__init__(reason)
        self.reason, self.retry_after_s = reason, retry_after_s


class Pace:
    """How many texts (or tokens) leave a second while others wait, over the last while of such waiting.

    Time in which none waits is left out: as many leave then as come, and not as many as could.
    """

    def __init__(self) -> None:
        self._left = self._time_s = 0.0
        """How many left and how long it took; what is PACE_S of waiting ago counts 1/e."""
        self._seen = 0
        self._at: float | None = None
        """Until when it is counted; None while none waits."""

    def waits(self, now: float, some: bool) -> None:
        """Take note whether requests wait from now on."""
        if not some:
            self._pass(now)
            self._at = None
        elif self._at is None:
            self._at = now

    def left(self, now: float, texts: float = 1) -> None:
        """Take note of a request that has left, or of tokens that have."""
        self._pass(now)
        if self._at is not None:
            self._left += texts
            self._seen += 1

    @property
    def per_s(self) -> float | None:
        """Texts a second, until the last one left; None until some have left while others waited.

        While none leaves it stays: a model that wakes from zero replicas will be as fast as it was.
        """
        return self._left / self._time_s if self._seen >= LEAST_SEEN and self._time_s else None

    def _pass(self, now: float) -> None:
        if self._at is not None:
            kept = math.exp((self._at - now) / PACE_S)
            self._left *= kept
            self._time_s = self._time_s * kept + PACE_S * (1 - kept)
            self._at = now


@dataclass(frozen=True)
class Turn:
    """A request that was let through; `Turns.end` takes it back."""

    key: str
    priority: int
    weight: int = 1


class Turns:
    """The turns of one model at one gateway. Its methods are called on one event loop."""

    def __init__(
        self,
        window: int,
        most: int,
        most_per_key: int,
        clock: Callable[[], float] = time.monotonic,
        slots: float = 0,
    ) -> None:
        """`slots`: texts that the replicas work on at once, as far as they are this gateway's; 0: none is kept."""
        self.window = window
        """Texts that may be on their way or at work at the same time."""
        self.slots = slots
        self.running = 0
        """Texts that are."""
        self._clock = clock
        self._queue: FairQueue[asyncio.Future[None]] = FairQueue(most, most_per_key)
        self._pace, self._speed = Pace(), Pace()
        """Of texts, and of tokens."""
        self._keys, self._reserve = RecentKeys(RECENT_S), Reserve()

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    def widen(self, window: int, slots: float = 0) -> None:
        """Change how many are let through, and how many the replicas work on at once."""
        self.window, self.slots = window, slots
        self._let_through()

    def bound(self, most: int, most_per_key: int) -> None:
        """Change how many may wait; those that wait already stay."""
        self._queue.bound(most, most_per_key)

    async def take(self, key: str, priority: int, cost: float, patience_s: float, weight: int = 1) -> Turn:
        """Wait for a turn, `patience_s` at most.

        Args:
            cost: tokens that are known to be needed.
            weight: texts that are asked for. One heavier than the window goes when nothing else runs.

        Raises:
            Busy: as many wait as may, or the turn would not come, or did not come, in time.
        """
        self._keys.saw(key, self._clock())
        wait_s = self._expected_s(key, priority)
        if wait_s > patience_s:
            ahead = self._queue.ahead(key, priority)
            raise self._busy(f"{ahead} texts go first, about {wait_s:.0f} s of work, more than it may wait", wait_s)
        entry = self._push(Turn(key, priority, weight), cost, self._clock() + patience_s, wait_s)
        is_owed = self._contended() and self._queue.is_owed(key, priority, MOST_RUNNING * self.slots)
        self._let_through()
        if is_owed:
            self._reserve.asked(self.slots, entry.request.done())
        await self._granted(entry, patience_s)
        return Turn(key, priority, weight)

    def charge(self, turn: Turn, tokens: float) -> None:
        """Take tokens from the key's share, beyond what `take` was told."""
        self._speed.left(self._clock(), tokens)
        self._queue.charge(turn.key, turn.priority, tokens)

    def end(self, turn: Turn) -> None:
        """Take a turn back: its request has ended."""
        self._pace.left(self._clock(), turn.weight)
        self._give_back(turn)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _give_back(self, turn: Turn) -> None:
        self.running -= turn.weight
        self._queue.end(turn.key, turn.priority, turn.weight)
        self._let_through()

    async def _granted(self, entry: Waiting[asyncio.Future[None]], patience_s: float) -> None:
        timer = asyncio.get_running_loop().call_later(patience_s, self._give_up, entry, patience_s)
        try:
            await entry.request
        except asyncio.CancelledError:
            request = entry.request
            if request.done() and not request.cancelled() and request.exception() is None:
                # It was let through in the very moment that its client left.
                self._give_back(Turn(entry.key, entry.priority, entry.weight))
            self._remove(entry)
            raise
        finally:
            timer.cancel()

    def _push(self, turn: Turn, cost: float, deadline: float, wait_s: float) -> Waiting[asyncio.Future[None]]:
        """Let a request wait, in the place of another one where no more may and it has more right to wait."""
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        key, priority = turn.key, turn.priority
        while True:
            try:
                return self._queue.push(granted, key, priority, cost, deadline, turn.weight)
            except Full as full:
                last = self._queue.last_in_line(key, priority) if full.whose == "all" else None
                if last is None:
                    whose = "of this key " if full.whose == "key" else ""
                    raise self._busy(f"{full.waiting} requests {whose}wait already", wait_s) from None
            self._refuse(last, "its place was given to a key that has fewer requests waiting, or goes first")

    def _remove(self, entry: Waiting[asyncio.Future[None]]) -> None:
        self._queue.remove(entry)
        self._let_through()  # those that may have waited behind it for room

    def _give_up(self, entry: Waiting[asyncio.Future[None]], patience_s: float) -> None:
        self._refuse(entry, f"its turn did not come within {patience_s:g} s")

    def _refuse(self, entry: Waiting[asyncio.Future[None]], reason: str) -> None:
        self._remove(entry)
        if not entry.request.done():
            entry.request.set_exception(self._busy(reason, self._expected_s(entry.key, entry.priority)))

    def _let_through(self) -> None:
        contended = self._contended()
        while (entry := self._next(contended)) is not None:
            if entry.request.done():  # its client has just left
                self._queue.end(entry.key, entry.priority, entry.weight)
                continue
            self.running += entry.weight
            self._speed.left(self._clock(), entry.cost)
            entry.request.set_result(None)
        for pace in (self._pace, self._speed):
            pace.waits(self._clock(), bool(self._queue))
        if self._speed.per_s is not None:
            self._queue.saved = max(LEAST_SAVED, SAVED_S * self._speed.per_s)

    def _contended(self) -> bool:
        """Tell whether several keys use the model."""
        return self._keys.count(self._clock()) > 1

    def _next(self, contended: bool) -> Waiting[asyncio.Future[None]] | None:
        kept = self._reserve.of(self.slots) if contended else 0
        if self.running >= (self.slots if kept else self.window):
            return None
        room = self.window - self.running if self.running else math.inf  # what is heavier than the window goes alone
        is_kept = kept > 0 and self.running >= self.slots - kept
        return self._queue.pop(room, kept_for=MOST_RUNNING * self.slots if is_kept else None)

    def _expected_s(self, key: str, priority: int) -> float:
        """Return how long a request that comes for a key now would wait.

        The first that waits is never refused for it: by its leaving a pace that was wrong is put right.
        """
        if self.running < self.window and not self._queue:
            return 0.0
        per_s = self._pace.per_s
        return self._queue.ahead(key, priority) / per_s if per_s else 0.0

    def _busy(self, reason: str, wait_s: float) -> Busy:
        return Busy(reason, max(LEAST_RETRY_S, math.ceil(min(MOST_RETRY_S, wait_s))))
