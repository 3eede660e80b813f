"""The order of a run over several sources, each with its share of the rows. Pure: computed for any position alone.

Which source a position belongs to is decided by the weights and the seed, and by nothing else. The sources are the
leaves of a binary tree, put together by Huffman's method (A Method for the Construction of Minimum-Redundancy Codes,
Proc. IRE, 1952): of the first n positions of a fork, n·a/(a + b) rounded are the left side's, where a and b are the
weights of its sides. Each rounding is off by half a row; as a side with sides of its own never has more than two
thirds of its fork, a source is off by less than ½ · (1 + ⅔ + ⅔² + …) = 1½ rows, however many there are and however
long the run is. That would give every W-th row of an even mixture, and with it a rank, one source alone: so the
positions of each BLOCK are shuffled. A source is within 1½ rows of its share at the end of each, and 3½ anywhere.

The n-th row of a source is what an order over that source alone visits n-th (jobs/data/batches.py): all its rows once,
then all again in another order, with a seed for each source.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np

from jobs.data import batches, permutation
from jobs.data.batches import Order

VERSION = 101
"""The order of mixtures that begin now, as a checkpoint notes it; orders over one source have versions below 100."""
BLOCK = 8
"""So many neighbouring positions are shuffled."""
_SHUFFLE, _SOURCE = 101, 102
"""What tells keys apart that are drawn from one seed."""


@dataclass(frozen=True)
class Part:
    """One source of a mixture."""

    name: str
    rows: int
    """How many it has to train on."""
    weight: float
    """Its share, beside those of the others."""
    max_epochs: float | None = None


@dataclass(frozen=True)
class Fork:
    """Two sides of a tree of sources, each a fork or a source by its number, with their weights, whole numbers."""

    left: int | Fork
    right: int | Fork
    left_weight: int
    weight: int
    """Of both sides."""

    def lefts(self, start: int, count: int) -> tuple[int, np.ndarray]:
        """Return how many of the first positions are the left side's, and of the next ones which: bool (count,).

        Exact: half a row is rounded up, in whole numbers of any size.
        """
        below, step = 2 * self.weight, 2 * self.left_weight
        before, rest = divmod(start * step + self.weight, below)
        fits = below * (count + 2) < 2**62
        ends = (np.arange(count + 1, dtype=np.int64 if fits else object) * step + rest) // below
        return before, np.diff(ends) == 1


def shares(weights: Sequence[float]) -> list[Fraction]:
    """Return the share of each weight of all; a weight is the decimal number that it is written as, 0.7 is 7/10."""
    exact = [Fraction(repr(weight)) for weight in weights]
    return [weight / sum(exact) for weight in exact]


def tree(weights: Sequence[float]) -> int | Fork:
    """Put sources together, always the two sides of the least weight first; of equal ones the earlier."""
    exact = shares(weights)
    whole = math.lcm(*(share.denominator for share in exact))
    waiting = [(int(share * whole), number, number) for number, share in enumerate(exact)]
    sides: list[int | Fork] = list(range(len(exact)))
    heapq.heapify(waiting)
    while len(waiting) > 1:
        (right, _, second), (left, _, first) = heapq.heappop(waiting), heapq.heappop(waiting)
        heapq.heappush(waiting, (left + right, len(sides), len(sides)))
        sides.append(Fork(sides[first], sides[second], left, left + right))
    return sides[waiting[0][2]]


@dataclass(frozen=True)
class Mixed:
    """The order in which a run visits the rows of its sources; they are numbered source after source."""

    parts: tuple[Part, ...]
    seed: int

    def __post_init__(self) -> None:
        assert all(part.rows > 0 for part in self.parts), "a source without rows"

    def take(self, start: int, count: int) -> np.ndarray:
        """Return the row numbers, int64 (count,), at the positions start … start + count - 1."""
        first = start - start % BLOCK
        sources, before = self._sources(first, start + count), self._counts(first)
        rows = np.empty(len(sources), dtype=np.int64)
        for number, order in enumerate(self._orders):
            here = np.flatnonzero(sources == number)
            if len(here):
                rows[here] = self._starts[number] + order.take(before[number], len(here))
        return rows[start - first :][:count]

    def counts(self, positions: int) -> list[int]:
        """Return how many of the first positions are each source's."""
        first = positions - positions % BLOCK
        rest = self._sources(first, positions)[: positions - first]
        return [a + int(b) for a, b in zip(self._counts(first), self._tallied(rest), strict=True)]

    def apart(self, rows: np.ndarray) -> list[np.ndarray]:
        """Return those of the row numbers, int64 (B,), that are each source's, int64 (b,)."""
        sources = np.searchsorted(self._starts, rows, side="right") - 1
        return [rows[sources == number] for number in range(len(self.parts))]

    @cached_property
    def _tree(self) -> int | Fork:
        return tree([part.weight for part in self.parts])

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.cumsum([0, *(part.rows for part in self.parts[:-1])])

    @cached_property
    def _orders(self) -> list[Order]:
        seeds = [int(_key(self.seed, _SOURCE, number) >> np.uint64(1)) for number in range(len(self.parts))]
        listed = batches.LISTED_ROWS // len(self.parts)
        return [Order(part.rows, seed, 2, listed) for part, seed in zip(self.parts, seeds, strict=True)]

    def _tallied(self, sources: np.ndarray) -> np.ndarray:
        return np.bincount(sources, minlength=len(self.parts))

    def _counts(self, positions: int) -> list[int]:
        """Return how many of the first positions, whole blocks, are each source's."""
        found, waiting = [0] * len(self.parts), [(self._tree, positions)]
        while waiting:
            side, count = waiting.pop()
            if isinstance(side, int):
                found[side] = count
                continue
            left, _ = side.lefts(count, 0)
            waiting += [(side.left, left), (side.right, count - left)]
        return found

    def _sources(self, first: int, end: int) -> np.ndarray:
        """Return the sources of the positions from `first`, where a block begins, to the end of the block of `end`."""
        blocks = -(-(end - first) // BLOCK)
        sources = np.empty(blocks * BLOCK, dtype=np.int64)
        waiting = [(self._tree, first, np.arange(len(sources)))]
        while waiting:
            side, start, places = waiting.pop()
            if isinstance(side, int):
                sources[places] = side
                continue
            before, lefts = side.lefts(start, len(places))
            waiting += [(side.left, before, places[lefts]), (side.right, start - before, places[~lefts])]
        drawn = permutation.mixed(np.arange(first, first + len(sources), dtype=np.uint64) ^ _key(self.seed, _SHUFFLE))
        shuffled = np.argsort(drawn.reshape(blocks, BLOCK), axis=1, kind="stable")
        return np.take_along_axis(sources.reshape(blocks, BLOCK), shuffled, axis=1).reshape(-1)


def order_of(parts: Sequence[Part], rows: int, seed: int, version: int) -> Order | Mixed:
    """Return the order of a run: of the sources that it mixes, or of its rows where it mixes none."""
    return Mixed(tuple(parts), seed) if parts else Order(rows, seed, version)


def _key(seed: int, *what: int) -> np.uint64:
    """Draw a key of its own for something from a run's seed."""
    found: np.uint64 = np.random.SeedSequence(seed, spawn_key=what).generate_state(1, np.uint64)[0]
    return found
