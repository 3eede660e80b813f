"""Which row goes to which rank at which step. Pure: the same answer for any number of workers and restarts.

Epoch e visits the N rows in a permutation drawn from (seed, e); position p of the whole run is row
permutation(p // N)[p % N]. Optimiser step s takes the positions [s·G, (s+1)·G); of these, rank r of W takes every
W-th. G need not divide by W: a rank may get fewer rows, and an empty micro-batch keeps it in step with the others.

Up to LISTED_ROWS the permutation is a list, which numpy draws; above, it is computed for the rows that are asked for
(jobs/data/permutation.py). In version 1 of the order it was a list at any size. Several sources with weights have an
order of their own (jobs/data/mixture.py), made of these.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from jobs.data import permutation

LISTED_ROWS = 1 << 20
"""A list of so many row numbers takes 8 MiB, twice where two epochs meet."""

VERSION = 2
"""The order of runs that begin now. A checkpoint notes its own: one that notes none is of version 1."""
EARLY = 3
"""That of runs with `data.start_early` (jobs/data/early_order.py)."""


@dataclass
class Order:
    """The order in which a run visits `rows` rows, epoch after epoch."""

    rows: int
    seed: int
    version: int = VERSION
    listed: int = LISTED_ROWS
    """Up to so many rows a permutation is a list."""
    _permutations: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        assert self.rows > 0, "an order over no rows"
        assert 1 <= self.version <= VERSION, f"no order has version {self.version}"

    def take(self, start: int, count: int) -> np.ndarray:
        """Return the row numbers, int64 [count], at the positions [start, start + count), across epochs."""
        positions = np.arange(start, start + count, dtype=np.int64)
        epochs, offsets = positions // self.rows, positions % self.rows
        rows = np.empty(count, dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = self._visited(int(epoch), offsets[here])
        return rows

    def _visited(self, epoch: int, offsets: np.ndarray) -> np.ndarray:
        """Return the row numbers, int64 [B], at offsets within an epoch, int64 [B]."""
        if self.version == 1 or self.rows <= self.listed:
            return self._list(epoch)[offsets]
        return permutation.keyed(self.rows, self.seed, epoch).at(offsets)

    def _list(self, epoch: int) -> np.ndarray:
        if epoch not in self._permutations:
            self._permutations = {e: p for e, p in self._permutations.items() if e == epoch - 1}
            generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, epoch])))
            self._permutations[epoch] = generator.permutation(self.rows)
        return self._permutations[epoch]


def micro_batch_size(wanted: int | str | None, global_batch_size: int, world_size: int) -> int:
    """Return the rows per forward pass: as asked for, else (also for `auto`, until that is found) up to 16 of a rank's.

    Args:
        wanted: a number, or what leaves it to Tandem: None or `auto`.
    """
    asked = wanted if isinstance(wanted, int) else 16
    return min(asked, rows_of_rank(global_batch_size, world_size))


def rows_of_rank(global_batch_size: int, world_size: int) -> int:
    """Return the rows of a step on the rank that has the most."""
    return -(-global_batch_size // world_size)


def accumulation_steps(global_batch_size: int, world_size: int, micro_batch: int) -> int:
    """Return the micro-batches per optimiser step, the same on every rank."""
    return -(-rows_of_rank(global_batch_size, world_size) // micro_batch)


def whole_groups(workers: int, parts: int) -> int:
    """Return how many of so many workers make groups of `parts` that share rows: one group at least."""
    return max(parts, workers - workers % parts)


def share(rows: np.ndarray, rank: int, world_size: int, micro_batch: int) -> list[np.ndarray]:
    """Split a step's row numbers, int64 [G], into this rank's micro-batches [b]; the last may be short or empty."""
    mine = rows[rank::world_size]
    count = accumulation_steps(len(rows), world_size, micro_batch)
    return [mine[i * micro_batch : (i + 1) * micro_batch] for i in range(count)]
