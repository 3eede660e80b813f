"""A permutation of any number of rows that is computed place by place: no list of the rows exists. Pure.

The generalised Feistel network of Black and Rogaway (Ciphers with Arbitrary Finite Domains, CT-RSA 2002), without the
claim to secrecy. N row numbers are laid out in a table of about √N by √N cells; in each round one coordinate is moved
on, around its own length, by a keyed hash of the other one, which can be undone whatever the hash is: so the cells are
permuted. The few cells past N, fewer than √N + 1, are walked on from until a cell below N comes. The hash is the
finaliser of SplitMix64 (Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators, OOPSLA 2014), less the
shifts that change nothing of a coordinate of 20 bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

MOST_ROWS = 1 << 40
"""A coordinate has 20 bits at most, so that its product with 44 bits of the hash fits into 64."""
ROUNDS = 12
"""With 8, places and pairs of places are even to 10⁶ permutations from 1,000 rows on; with 12, from 10 rows on."""

_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_HALF, _SPARE, _KEPT = np.uint64(32), np.uint64(20), np.uint64(44)


@dataclass(frozen=True)
class Permutation:
    """A permutation of the numbers 0 … size - 1, decided by its keys."""

    size: int
    """N, from 1 to MOST_ROWS."""
    keys: np.ndarray
    """One for each round, uint64 (ROUNDS,)."""

    def __post_init__(self) -> None:
        assert 0 < self.size <= MOST_ROWS, f"a permutation of {self.size} rows"
        assert self.keys.dtype == np.uint64, "keys have 64 bits"

    def at(self, places: np.ndarray) -> np.ndarray:
        """Return the row numbers, int64 (B,), at places 0 … N - 1, int64 (B,)."""
        rows = self._moved(places.astype(np.uint64))
        while len(outside := np.flatnonzero(rows >= np.uint64(self.size))):
            rows[outside] = self._moved(rows[outside])
        return rows.astype(np.int64)

    def _moved(self, cells: np.ndarray) -> np.ndarray:
        """Return the cells, uint64 (B,), that cells of the table, uint64 (B,), go to."""
        height = math.isqrt(self.size - 1) + 1
        high, wide = np.uint64(height), np.uint64(-(-self.size // height))
        down = cells // wide
        across = cells - down * wide
        for first, second in zip(self.keys[0::2], self.keys[1::2], strict=True):
            down = _around(down + _hashed(across, first, high), high)
            across = _around(across + _hashed(down, second, wide), wide)
        return down * wide + across


def keyed(size: int, seed: int, epoch: int) -> Permutation:
    """Return the permutation of `size` rows in an epoch of the runs with a seed."""
    # A key of its own kind: the seeds of dropout (jobs/worker/loop.py) are drawn from the same seed.
    sequence = np.random.SeedSequence(seed, spawn_key=(epoch, ROUNDS))
    return Permutation(size, sequence.generate_state(ROUNDS, np.uint64))


def mixed(values: np.ndarray) -> np.ndarray:
    """Return values, uint64 (B,), mixed by the whole finaliser of SplitMix64: no two are mixed alike."""
    values = (values ^ (values >> np.uint64(30))) * _FIRST
    values = (values ^ (values >> np.uint64(27))) * _SECOND
    found: np.ndarray = values ^ (values >> np.uint64(31))
    return found


def _hashed(values: np.ndarray, key: np.uint64, length: np.uint64) -> np.ndarray:
    """Hash values, uint64 (B,), to 0 … length - 1; each of these comes up as often as another, to 2⁻²⁴ of it."""
    mixed = (values ^ key) * _FIRST
    mixed ^= mixed >> _HALF
    mixed *= _SECOND
    mixed >>= _SPARE
    mixed *= length
    mixed >>= _KEPT
    return mixed


def _around(values: np.ndarray, length: np.uint64) -> np.ndarray:
    """Return values below 2 · length, uint64 (B,), modulo length: a difference below 0 wraps to a number far above."""
    return np.minimum(values, values - length)
