"""Interactions of a user with items, as recommenders read them: which count, and in which order."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import Any

from jobs.tasks import TaskError
from jobs.tasks.grouping import moments
from jobs.tasks.labels import column_of
from jobs.tasks.messages import is_blank

End = tuple[float, int]
"""The last moment of a history, and how many of its interactions are of that moment."""
ENDS = 20_000
"""Of so many users it is kept when their histories end."""


@dataclass(frozen=True)
class History:
    """What one user has done."""

    items: list[str]
    """The items that count, the earliest first."""
    rows: list[int]
    """Which row of the example each of them is."""
    below: frozenset[str]
    """Items whose ratings are too low to count."""
    left_out: int
    """How many rows that is."""
    tied: int
    """How many of the rows that count share their moment with another, so that the data holds no order of them."""
    copies: int = 0
    """How many rows repeat an item and its moment: they do not count."""
    copies_of_last: tuple[int, ...] = ()
    """Which of them repeat the last one that counts."""
    user: str = ""
    end: End | None = None
    """None where no interaction counts, or there is no time."""


def history_of(
    example: Mapping[str, Any],
    user: str,
    item: str,
    time: str | None,
    rating: str | None = None,
    least: float | None = None,
    shuffle: bool = True,
) -> History:
    """Return a user's history.

    Args:
        example: lists of a user's rows, in the order of `time`.
        user, item, time, rating: names of columns.
        least: rows with a lower rating do not count.
        shuffle: order the rows of one moment by a hash of user and item, not as they stand: a file that is sorted by
            item would else hold a pattern that nobody followed.
    """
    names = [item_of(value, item) for value in example[item]]
    counts = [True] * len(names)
    if rating is not None and least is not None:
        counts = [rating_of(value, rating) >= least for value in example[rating]]
    rows = [row for row, counted in enumerate(counts) if counted]
    when = moments(list(example[time])) if time is not None else list(range(len(names)))
    first = {(when[row], names[row]): row for row in reversed(rows)}
    copies = [row for row in rows if first[when[row], names[row]] != row]
    groups = [list(group) for _, group in groupby(sorted(first.values()), key=when.__getitem__)]
    if shuffle:
        groups = [sorted(group, key=lambda row: _drawn(example[user], names[row])) for group in groups]
    ordered = [row for group in groups for row in group]
    below = frozenset(name for name, counted in zip(names, counts, strict=True) if not counted)
    tied = sum(len(group) for group in groups if len(group) > 1)
    last = ordered[-1] if ordered else -1
    of_last = tuple(row for row in copies if first[when[row], names[row]] == last)
    end = (when[last], sum(when[row] == when[last] for row in ordered)) if time is not None and ordered else None
    items, left_out = [names[row] for row in ordered], len(names) - len(rows)
    return History(items, ordered, below, left_out, tied, len(copies), of_last, str(example[user]), end)


def item_of(value: Any, column: str) -> str:
    """Return the name of an item: a text, or a whole number by its digits.

    Raises:
        TaskError: it is neither.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int) or is_blank(str(value)):
        raise TaskError(f"column {column!r} holds {value!r:.60}, which names no item: a text or a whole number does")
    return str(value).strip()


def rating_of(value: Any, column: str) -> float:
    """Return a rating as a number.

    Raises:
        TaskError: it is none.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if isinstance(value, bool) or number != number:
        raise TaskError(f"column {column!r} holds {value!r:.60}, which is no rating")
    return number


def check_row(example: Mapping[str, Any], item: str, rating: str | None) -> None:
    """Raise TaskError for a row that names no item, or has no rating where one decides whether it counts."""
    item_of(column_of(example, item, "item_column"), item)
    if rating is not None:
        rating_of(column_of(example, rating, "rating_column"), rating)


@dataclass(frozen=True)
class InteractionFindings:
    """What histories say, out of one chunk or many."""

    counts: Counter[str] = field(default_factory=Counter)
    """How often each item occurs."""
    users: int = 0
    alone: int = 0
    """Users with one interaction, or none: there is nothing to predict from them."""
    longest: int = 0
    """Most different items of one user."""
    left_out: int = 0
    tied: int = 0
    copies: int = 0
    ends: dict[str, End] = field(default_factory=dict)
    """When the histories of the first `ENDS` users end."""

    @classmethod
    def of(cls, histories: Sequence[History]) -> InteractionFindings:
        """Return what the histories of a chunk say."""
        return cls(
            Counter(name for history in histories for name in history.items),
            len(histories),
            sum(len(history.items) < 2 for history in histories),
            max((len({*history.items, *history.below}) for history in histories), default=0),
            sum(history.left_out for history in histories),
            sum(history.tied for history in histories),
            sum(history.copies for history in histories),
            {history.user: history.end for history in histories[:ENDS] if history.end is not None},
        )

    def merged(self, later: InteractionFindings) -> InteractionFindings:
        """Return the findings of both chunks."""
        return InteractionFindings(
            self.counts + later.counts,
            self.users + later.users,
            self.alone + later.alone,
            max(self.longest, later.longest),
            self.left_out + later.left_out,
            self.tied + later.tied,
            self.copies + later.copies,
            dict(islice({**self.ends, **later.ends}.items(), ENDS)),
        )


def _drawn(user: Any, item: str) -> bytes:
    return hashlib.blake2b(f"{user}\0{item}".encode(), digest_size=8).digest()
