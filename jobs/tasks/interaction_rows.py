"""Histories of items as rows: windows to learn from, and ends to predict with the items that they are ranked among."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jobs.tasks import Columns
from jobs.tasks.interactions import End, History
from jobs.tasks.ranking import popularity


@dataclass(frozen=True)
class Encoding:
    """What decides how histories become rows."""

    numbers: Mapping[str, int]
    """The known items' numbers, from 1."""
    counts: Sequence[int]
    """How often each occurs in the training data."""
    length: int
    """The latest so many items of a history are read."""
    met: int
    """So many of the items that a user has met are noted, the latest ones."""
    negatives: int
    seed: int
    ends: Mapping[str, End] = field(default_factory=dict)
    """When the histories end that were learned, by user."""

    def known(self, items: Sequence[str]) -> list[int]:
        """Return the numbers of those items that have one."""
        return [self.numbers[item] for item in items if item in self.numbers]


def to_learn(histories: Sequence[History], encoding: Encoding) -> Columns:
    """Return the windows of histories: inputs and labels (N, L) int32, targets (N,), and what is counted."""
    known = [encoding.known(history.items) for history in histories]
    parts = [part for numbers in known for part in windows(numbers, encoding.length)]
    inputs, labels = (np.zeros((len(parts), encoding.length), dtype=np.int32) for _ in range(2))
    for row, (before, after) in enumerate(parts):
        inputs[row, : len(before)], labels[row, : len(after)] = before, after
    return {
        "inputs": inputs,
        "labels": labels,
        "targets": (labels > 0).sum(1).astype(np.int32),
        "unknown": np.array([len(of.items) > len(kept) for of, kept in zip(histories, known, strict=True)]),
        "short": np.array([len(numbers) < 2 for numbers in known]),
    }


def to_predict(histories: Sequence[History], users: Sequence[Any], encoding: Encoding) -> Columns:
    """Return a row for each history, of what came last in it.

    Besides inputs and labels: the wanted item, (N,), 0 where it is not known; negatives (N, K) and met (N, S), items;
    popular and popular_all (N,), how many of those that it is ranked among are more popular. All int32.
    """
    places = popularity(encoding.counts)
    parts = [_end(history, user, encoding, places) for history, user in zip(histories, users, strict=True)]
    rows: Columns = {key: np.stack([part[key] for part in parts]) for key in parts[0]}
    return {**rows, "targets": (rows["wanted"] > 0).astype(np.int32), "unseen": rows["wanted"] == 0}


def windows(numbers: Sequence[int], length: int) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """Cut a history into (items, the item that follows each), of `length` or fewer, so that each is followed once.

    From the end backwards: what is short is the beginning.
    """
    end = len(numbers)
    while end > 1:
        start = max(0, end - 1 - length)
        yield numbers[start : end - 1], numbers[start + 1 : end]
        end = start + 1


def drawn(count: int, items: int, known: set[int], seed: int, user: Any) -> np.ndarray:
    """Draw items that a user has not met, int32 (count,), by a seed and the user alone; 0 where there are too few.

    Args:
        items: the items are numbered from 1 to this.
        known: those that are not drawn.
    """
    digest = hashlib.blake2b(f"{seed} {user}".encode(), digest_size=8).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))
    some = 1 + generator.choice(items, min(items, count + len(known)), replace=False)
    new = [number for number in some.tolist() if number not in known][:count]
    return np.array(new + [0] * (count - len(new)), dtype=np.int32)


def _end(history: History, user: Any, encoding: Encoding, places: np.ndarray) -> Columns:
    before, (wanted, *_) = encoding.known(history.items[:-1]), [*encoding.known(history.items[-1:]), 0]
    known = set(encoding.known([*history.items, *history.below]))
    against = drawn(encoding.negatives, len(encoding.counts), known, encoding.seed, user)
    latest = list(dict.fromkeys(reversed(before)))
    kept, noted = before[-encoding.length :], latest[: encoding.met]
    inputs, labels = (np.zeros(encoding.length, dtype=np.int32) for _ in range(2))
    inputs[: len(kept)], labels[max(0, len(kept) - 1)] = kept, wanted
    ahead = places < places[wanted - 1] if wanted else np.zeros(len(places), dtype=bool)
    return {
        "inputs": inputs,
        "labels": labels,
        "wanted": np.array(wanted, dtype=np.int32),
        "negatives": against,
        "met": np.array(noted + [0] * (encoding.met - len(noted)), dtype=np.int32),
        "popular": ahead[against[against > 0] - 1].sum(dtype=np.int32),
        "popular_all": ahead.sum(dtype=np.int32) - ahead[np.array(noted, dtype=np.int32) - 1].sum(dtype=np.int32),
        "unknown": np.array(len(history.items) - 1 > len(before)),
        "few": against[-1] == 0,
        "told": np.array(history.end is not None and history.end <= encoding.ends.get(history.user, (-np.inf, 0))),
        "again": np.array(wanted in latest),
        "much": np.array(len(latest) > encoding.met),
    }
