"""Who works on which shard: the bookkeeping of a prediction. Pure: no Ray, no clock, no files."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from jobs.predict.rows import Shard

AHEAD = 2
"""Shards that a worker has at most: one that it works on, and the next, so that it need not wait."""


class TooOften(RuntimeError):
    """A shard, or the start of workers, failed more often than it may."""


@dataclass
class Desk:
    """Gives shards out, takes back those of workers that were lost, and says when that happens too often."""

    shards: Iterator[Shard]
    most_failures: int
    """How often the same shard may fail, and how often workers may before they are ready."""
    _back: deque[Shard] = field(default_factory=deque)
    _with: dict[int, list[Shard]] = field(default_factory=dict)
    _failures: Counter[int] = field(default_factory=Counter)
    _starts: int = 0
    _is_empty: bool = False
    """Whether the source has no more."""

    def hire(self, worker: int) -> None:
        """Take note that a worker is ready."""
        self._with[worker] = []
        self._starts = 0

    def next(self) -> tuple[int, Shard] | None:
        """Give a shard to the worker that has the fewest; None where all have enough, or none is left."""
        if not self._with:
            return None
        worker = min(self._with, key=lambda each: len(self._with[each]))
        if len(self._with[worker]) >= AHEAD:
            return None
        shard = self._back.popleft() if self._back else next(self.shards, None)
        if shard is None:
            self._is_empty = True
            return None
        self._with[worker].append(shard)
        return worker, shard

    def done(self, worker: int, shard: Shard) -> None:
        """Take note that a worker has done a shard."""
        self._with[worker].remove(shard)

    def lost(self, worker: int, why: str) -> None:
        """Take a lost worker's shards back; the first of them is the one that it worked on.

        Raises:
            TooOften: that one has failed too often, or workers have before they were ready.
        """
        shards = self._with.pop(worker, None)
        if shards is None:
            self._starts += 1
            if self._starts > self.most_failures:
                raise TooOften(f"a worker failed before it was ready, {self._starts} times in a row: {why}")
            return
        self._back.extendleft(reversed(shards))
        if not shards:
            return
        at_work = shards[0]
        self._failures[at_work.number] += 1
        if self._failures[at_work.number] > self.most_failures:
            rows = f"rows {at_work.first} to {at_work.first + len(at_work.rows) - 1}"
            begins = f", from {at_work.rows[0].where}" if at_work.rows[0].where else ""
            raise TooOften(
                f"the worker failed {self._failures[at_work.number]} times on the same {rows}{begins}: {why}"
            )

    @property
    def finished(self) -> bool:
        """Whether all shards are done. It is not known before `next` has found the source empty."""
        return self._is_empty and not self._back and not any(self._with.values())
