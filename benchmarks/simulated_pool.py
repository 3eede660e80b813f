"""A pool of replicas, simulated request by request: what a policy of scaling costs, and how long requests wait.

A replica has slots; a request holds one for its prompt's time and its tokens' time, at the speed that a slot has on a
busy replica (slower than real at low load, so that no policy gains by crowding). Requests queue in one place, first in,
first out, and go to the replica with the most work that still has room (packing leaves others free to go). A replica
takes `start_s` to be ready, one that leaves takes no new request and is paid for until its last one ends.
"""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from serve.scaling.policy import Look


@dataclass(frozen=True)
class Engine:
    """One replica, as far as scaling sees it."""

    slots: int = 16
    tokens_per_s: float = 40.0
    """Of one slot, with all of them busy."""
    prompt_tokens_per_s: float = 4_000.0
    start_s: float = 10.0


class Arrivals(NamedTuple):
    """Requests in the order in which they come: arrays of one length."""

    at: np.ndarray
    """Seconds, float64, ascending."""
    prompt: np.ndarray
    """Tokens of the prompt, int64."""
    generated: np.ndarray
    """Tokens that will be generated, int64."""


class Moment(NamedTuple):
    """What a policy may look at: tokens for ours, requests for Serve's."""

    look: Look
    ongoing: int
    """Requests that run or wait."""
    target: int
    """What was decided last."""


Policy = Callable[[Moment], int]


@dataclass
class Outcome:
    """What one policy made of the arrivals."""

    waits: np.ndarray
    """Seconds from arrival to the first generated token, by request."""
    replica_s: float
    """Seconds of replicas, from being asked for until they are gone."""
    most: int
    ups: int
    downs: int
    decision_us: float
    """Microseconds of one decision, the mean."""
    trace: list[tuple[float, int, int]] = field(default_factory=list)
    """(seconds, replicas there or starting, requests that wait) at each look."""


class Pool:
    """The replicas and the queue; events are (time, number, what, replica)."""

    def __init__(self, engine: Engine, arrivals: Arrivals, expected: float) -> None:
        """`expected`: tokens that a request is taken to generate, before it has."""
        self._engine, self._arrivals, self._expected = engine, arrivals, expected
        self._events: list[tuple[float, int, int, int]] = []
        self._serial = 0
        self._busy: list[int] = []
        """By replica, how many of its slots are; -1 when it is gone."""
        self._leaving: set[int] = set()
        self._open: list[set[int]] = [set() for _ in range(engine.slots)]
        """By number of busy slots, the replicas with room."""
        self._starting: dict[int, float] = {}
        self._queue: deque[int] = deque()
        self._asked_at: dict[int, float] = {}
        self.waits = np.zeros(len(arrivals.at))
        self.replica_s = 0.0
        self.running = 0
        self._arrived = self._done = 0.0
        self._queued = 0.0

    # -- events ----------------------------------------------------------------------------------------------------

    def _later(self, at: float, what: int, replica: int) -> None:
        self._serial += 1
        heapq.heappush(self._events, (at, self._serial, what, replica))

    READY, ENDED = 0, 1

    def advance(self, until: float) -> None:
        """Work off the events up to a time."""
        while self._events and self._events[0][0] <= until:
            now, _, what, replica = heapq.heappop(self._events)
            if what == self.READY:
                if self._starting.pop(replica, None) is not None:
                    self._open[0].add(replica)
            else:
                self._end(now, replica)
            self._dispatch(now)

    def arrive(self, request: int) -> None:
        """Let a request come."""
        now = float(self._arrivals.at[request])
        self._queue.append(request)
        tokens = float(self._arrivals.prompt[request]) + self._expected
        self._queued += tokens
        self._arrived += tokens
        self._dispatch(now)

    def _dispatch(self, now: float) -> None:
        while self._queue:
            level = next((at for at in reversed(range(self._engine.slots)) if self._open[at]), None)
            if level is None:
                return
            replica = self._open[level].pop()
            self._place(replica, level + 1)
            request = self._queue.popleft()
            prompt, generated = int(self._arrivals.prompt[request]), int(self._arrivals.generated[request])
            first = now + prompt / self._engine.prompt_tokens_per_s + 1 / self._engine.tokens_per_s
            self.waits[request] = first - self._arrivals.at[request]
            self._queued -= prompt + self._expected
            self._done += prompt
            self.running += 1
            self._later(first + (generated - 1) / self._engine.tokens_per_s, self.ENDED, replica)

    def _place(self, replica: int, busy: int) -> None:
        self._busy[replica] = busy
        if busy < self._engine.slots and replica not in self._leaving:
            self._open[busy].add(replica)

    def _end(self, now: float, replica: int) -> None:
        busy = self._busy[replica]
        if busy < self._engine.slots:
            self._open[busy].discard(replica)
        self.running -= 1
        self._place(replica, busy - 1)
        if busy == 1 and replica in self._leaving:
            self._leave(now, replica)

    # -- replicas --------------------------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        """Replicas that are ready or will be."""
        return len(self._asked_at) - len(self._leaving)

    def scale(self, now: float, target: int) -> None:
        """Start or remove replicas until there are `target`."""
        while self.count < target:
            replica = len(self._busy)
            self._busy.append(0)
            self._asked_at[replica] = self._starting[replica] = now
            self._later(now + self._engine.start_s, self.READY, replica)
        while self.count > target:
            self._remove(now)

    def _remove(self, now: float) -> None:
        if self._starting:
            replica = next(reversed(self._starting))
            del self._starting[replica]
            self._leave(now, replica)
            return
        level = next((at for at in range(self._engine.slots) if self._open[at]), None)
        if level is None:
            replica = next(at for at, busy in enumerate(self._busy) if busy > 0 and at not in self._leaving)
        else:
            replica = self._open[level].pop()
        self._leaving.add(replica)
        if not self._busy[replica]:
            self._leave(now, replica)

    def _leave(self, now: float, replica: int) -> None:
        self._leaving.discard(replica)
        self._busy[replica] = -1
        self.replica_s += now - self._asked_at.pop(replica)

    # -- looks -----------------------------------------------------------------------------------------------------

    def look(self, now: float, passed: float) -> Look:
        """Return what a policy sees, and begin to count anew."""
        generated = self.running * self._engine.tokens_per_s * passed
        arrived, done = self._arrived, self._done + generated
        self._arrived = self._done = 0.0
        ready = self.count - len(self._starting)
        waiting = max(0.0, self._queued) if self._queue else 0.0
        left, slots = self.running * self._expected / 2, self._engine.slots
        full = self.running >= slots * ready > 0
        by_slots = (self.running + len(self._queue)) / slots
        return Look(now, arrived, waiting, left, done, ready, len(self._starting), full, by_slots)

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    def finish(self, now: float) -> None:
        """Remove what is left."""
        for replica in list(self._asked_at):
            self._leave(now, replica)


def run(engine: Engine, arrivals: Arrivals, policy: Policy, first: int, look_s: float = 0.5) -> Outcome:
    """Let a policy look every `look_s` until the last request has begun; it starts with `first` ready replicas."""
    pool = Pool(engine, arrivals, expected=float(arrivals.generated.mean()))
    pool.scale(-engine.start_s, first)
    outcome = Outcome(pool.waits, 0.0, first, 0, 0, 0.0)
    now, request, looks, spent, target = 0.0, 0, 0, 0.0, first
    end = float(arrivals.at[-1]) if len(arrivals.at) else 0.0
    while now <= end or pool.waiting or pool.running:
        while request < len(arrivals.at) and arrivals.at[request] <= now:
            pool.advance(float(arrivals.at[request]))
            pool.arrive(request)
            request += 1
        pool.advance(now)
        seen = Moment(pool.look(now, look_s), pool.running + pool.waiting, target)
        begun = time.perf_counter()
        wanted = policy(seen)
        spent += time.perf_counter() - begun
        looks += 1
        outcome.ups += wanted > target
        outcome.downs += wanted < target
        outcome.most = max(outcome.most, wanted)
        outcome.trace.append((now, pool.count, pool.waiting))
        target = wanted
        pool.scale(now, target)
        now += look_s
    pool.finish(now)
    outcome.replica_s = pool.replica_s
    outcome.decision_us = 1e6 * spent / looks
    return outcome
