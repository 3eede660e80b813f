"""What a client asks a recommender, and what it is answered. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jobs.tasks import TaskError

K = 10
"""So many items are answered where a client does not say."""


@dataclass(frozen=True)
class Wish:
    """One question."""

    known: list[int]
    """The items of the history that the model knows, by number from 1, the earliest first."""
    unknown: int
    """How many others it holds."""
    k: int
    left_out: frozenset[int]
    """Items that are not answered, by number from 1."""


def wish_of(instance: Any, numbers: Mapping[str, int], items: int) -> Wish:
    """Read an instance: a history alone, or a mapping with also_seen, k and exclude_seen beside it.

    Args:
        numbers: the known items' numbers.
        items: how many there are.

    Raises:
        TaskError: k is out of range, or the history or also_seen is no list of names.
    """
    asked = instance if isinstance(instance, Mapping) else {"history": instance}
    names, others = _names(asked["history"], "a history"), _names(asked.get("also_seen", ()), "also_seen")
    k = int(asked.get("k", min(K, items)))
    if not 1 <= k <= items:
        raise TaskError(f"k is {k}: there are {items} items to choose from")
    known = [numbers[name] for name in names if name in numbers]
    seen = frozenset([*known, *(numbers[name] for name in others if name in numbers)])
    return Wish(known, len(names) - len(known), k, seen if asked.get("exclude_seen", True) else frozenset())


def _names(given: Any, what: str) -> list[str]:
    if isinstance(given, str | bytes) or not all(isinstance(name, str) for name in given):
        raise TaskError(f"{what} is a list of items' names, as texts (given: {given!r:.60})")
    return [name.strip() for name in given if name.strip()]  # "" pads the lists of a batch to one length


def shares(counts: Sequence[int]) -> np.ndarray:
    """Return each item's share of the training data, which ranks by popularity: (I,) float32."""
    return np.asarray(counts, dtype=np.float32) / max(1, sum(counts))


def answer(wish: Wish, scores: np.ndarray, items: Sequence[str], by: str) -> dict[str, Any]:
    """Return the best items and their scores, from scores (I,) float32; fewer than k where no more are unseen."""
    order = np.argsort(-scores, kind="stable")[: wish.k + len(wish.left_out)]
    best = [index for index in order.tolist() if index + 1 not in wish.left_out][: wish.k]
    return {
        "items": [items[index] for index in best],
        "scores": [float(scores[index]) for index in best],
        "unknown": wish.unknown,
        "ranked_by": by,
    }
