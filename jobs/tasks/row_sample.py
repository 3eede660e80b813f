"""Numbers of some rows, drawn so that it does not matter where the data was cut into chunks.

Of up to `most` rows all are kept, so that what is made of them is exact; of more, those whose contents have the lowest
hashes, which is a draw without replacement that any order of merging makes alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MOST = 20_000
"""Rows that are kept of a table."""


@dataclass(frozen=True)
class RowSample:
    """keys (n,) uint64, sorted; values: name → (n, …) float64, NaN where a row has no number."""

    keys: np.ndarray
    values: Mapping[str, np.ndarray]
    most: int = MOST

    @classmethod
    def of(cls, rows: Sequence[Any], values: Mapping[str, np.ndarray], most: int = MOST) -> RowSample:
        """Draw from N rows; what `repr` says of each decides, and values (N, …) are what is kept of it."""
        digests = (hashlib.blake2b(repr(row).encode(errors="surrogatepass"), digest_size=8).digest() for row in rows)
        keys = np.frombuffer(b"".join(digests), dtype="<u8")
        return cls(keys, values, most)._drawn()

    def merged(self, later: RowSample) -> RowSample:
        """Return the draw from the rows of both."""
        names = {**self.values, **later.values}
        values = {name: np.concatenate([self._column(name, later), later._column(name, self)]) for name in names}
        return RowSample(np.concatenate([self.keys, later.keys]), values, min(self.most, later.most))._drawn()

    def __getitem__(self, name: str) -> np.ndarray:
        """Return the numbers of one column that are there, (m, …) float64."""
        values = self.values[name]
        return values[~np.isnan(values).reshape(len(values), -1).any(1)]

    def _column(self, name: str, other: RowSample) -> np.ndarray:
        if name in self.values:
            return self.values[name]
        return np.full((len(self.keys), *other.values[name].shape[1:]), np.nan)

    def _drawn(self) -> RowSample:
        """Keep the lowest keys. Rows of one key are copies, so that it does not matter which of them are kept."""
        order = np.argsort(self.keys, kind="stable")[: self.most]
        return RowSample(self.keys[order], {name: value[order] for name, value in self.values.items()}, self.most)
