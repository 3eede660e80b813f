"""The order of a run that begins before all its rows are there: `data.start_early`.

The first pass goes through the files in their order (jobs/data/arrivals.py), sixteen at a time, and visits the rows of
these in a permutation drawn from (seed, number of the group). Later passes are those of any run (jobs/data/batches.py):
over all rows, which are numbered in the order of their files. So what is visited when follows from the rows alone,
whether they are there or come one after the other.
"""

from __future__ import annotations

import numpy as np

from jobs.data import batches, permutation
from jobs.data.arrivals import Arriving

_GROUPS = permutation.ROUNDS + 1
"""A key of its own kind, as `permutation.keyed` has one."""


class EarlyOrder:
    """The order in which a run visits rows that arrive; whoever asks for rows that are not there waits for them."""

    def __init__(self, rows: Arriving, seed: int) -> None:
        self._rows, self._seed = rows, seed
        self._group: tuple[int, np.ndarray] | None = None
        self._later: batches.Order | None = None

    def take(self, start: int, count: int) -> np.ndarray:
        """Return the row numbers, int64 [count], at the positions [start, start + count), across passes.

        Raises:
            NoMore: rows among them do not come.
        """
        self._rows.until(start + count)
        positions = np.arange(start, start + count, dtype=np.int64)
        rows = np.empty(count, dtype=np.int64)
        first = positions < self._rows.count if self._rows.whole else np.ones(count, dtype=bool)
        groups = np.searchsorted(self._rows.ends, positions[first], side="right")
        found = rows[first]
        for group in np.unique(groups):
            here = groups == group
            begin = int(self._rows.ends[group - 1]) if group else 0
            found[here] = begin + self._visited(int(group), begin, positions[first][here] - begin)
        rows[first] = found
        if not first.all():
            rows[~first] = self._all().take(int(positions[~first][0]), int((~first).sum()))
        return rows

    def _visited(self, group: int, begin: int, offsets: np.ndarray) -> np.ndarray:
        """Return which rows of a group, int64 [B], are at offsets within it, int64 [B]."""
        size = int(self._rows.ends[group]) - begin
        sequence = np.random.SeedSequence(self._seed, spawn_key=(group, _GROUPS))
        if size > batches.LISTED_ROWS:
            keys = sequence.generate_state(permutation.ROUNDS, np.uint64)
            return permutation.Permutation(size, keys).at(offsets)
        if self._group is None or self._group[0] != group:
            self._group = group, np.random.Generator(np.random.PCG64(sequence)).permutation(size)
        return self._group[1][offsets]

    def _all(self) -> batches.Order:
        if self._later is None:
            self._later = batches.Order(self._rows.count, self._seed)
        return self._later
