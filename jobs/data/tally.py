"""How many of the examples are different, by their hashes: in memory where these are few, else part by part.

A part are the hashes with one remainder. All that are equal are in one part, so that each part is counted by itself,
and a count is exact at any number of examples, in the memory of LISTED hashes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

LISTED = 1 << 20
"""Hashes that are listed at a time: 8 MiB, a few times over while they are sorted."""

Hashes = Callable[[], Iterable[np.ndarray]]
"""Gives the hashes of all examples, in order: arrays uint64 (n,), as often as it is asked."""


@dataclass(frozen=True)
class Tally:
    """How many examples there are, and how many different ones."""

    count: int
    contents: int
    """How many differ in what is encoded of them."""
    groups: int
    """How many differ in what keeps them together in a split."""
    answers: int
    """How many differ in their content or its answer."""

    @property
    def copies(self) -> int:
        """How many have the content of an earlier one."""
        return self.count - self.contents

    @property
    def kin(self) -> int:
        """How many have the group of an earlier one, and another content."""
        return self.contents - self.groups

    @property
    def contradicting(self) -> int:
        """How many have the content of an earlier one, and another answer."""
        return self.answers - self.contents


def tally_of(contents: np.ndarray, groups: np.ndarray, answers: np.ndarray) -> Tally:
    """Count hashes that are in memory, uint64 (N,) each; `answers` (0,) where the contents hold them."""
    different = len(np.unique(contents))
    return Tally(
        len(contents),
        different,
        len(np.unique(groups)),
        len(np.unique(answers)) if len(answers) else different,
    )


def different(hashes: Hashes, count: int, listed: int = LISTED) -> int:
    """Count the different ones of `count` hashes."""
    parts = _parts(count, listed)
    return sum(len(np.unique(_part(hashes(), number, parts))) for number in range(parts))


def among(hashes: Hashes, others: Hashes, count: int, listed: int = LISTED) -> int:
    """Count those of some hashes that are among others; both together are `count`."""
    parts = _parts(count, listed)
    pairs = ((_part(hashes(), number, parts), _part(others(), number, parts)) for number in range(parts))
    return sum(int(np.isin(one, other).sum()) for one, other in pairs)


def mark_copies(hashes: Hashes, marks: np.ndarray, listed: int = LISTED) -> None:
    """Mark in `marks`, bool (N,), which may be a file, those of N hashes that an earlier one is equal to."""
    parts = _parts(len(marks), listed)
    for number in range(parts):
        found, places, at = [], [], 0
        for array in hashes():
            inside = np.flatnonzero(array % np.uint64(parts) == number)
            found.append(array[inside])
            places.append(inside + at)
            at += len(array)
        where = np.concatenate(places)
        _, first = np.unique(np.concatenate(found), return_index=True)
        marks[where] = True
        marks[where[first]] = False


def _parts(count: int, listed: int) -> int:
    return max(1, -(-count // listed))


def _part(hashes: Iterable[np.ndarray], number: int, parts: int) -> np.ndarray:
    none = np.zeros(0, dtype=np.uint64)
    return np.concatenate([none, *(array[array % np.uint64(parts) == number] for array in hashes)])
