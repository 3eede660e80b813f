"""How rows of a table become examples: all rows of a user, of a series, one after the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from jobs.tasks import TaskError

YEARS = (631_152_000, 4_102_444_800)
"""From 1990 to 2100, in seconds since 1970."""
CLOCKS = {"in seconds": 1, "in milliseconds": 10**3, "in microseconds": 10**6, "in nanoseconds": 10**9}
"""Units in which moments since 1970 are counted; within `YEARS` no number is of two of them."""


@dataclass(frozen=True)
class Grouping:
    """Rows that agree in the columns `by` are one example, in the order of the column `order`.

    The example holds the value of each column of `by`, and of every other column a list, with an entry for each row.
    """

    by: tuple[str, ...]
    order: str | None = None
    """None: the order of the data. Rows of one moment keep the order of the data."""
    options: Mapping[str, str] = field(default_factory=dict)
    """The task's options that name the columns, by column: for whoever is told that one is missing."""
    whole: bool = False
    """True where no answer is given of a group without one of its rows: what comes next would be another step."""


def moments(values: Sequence[Any]) -> list[float]:
    """Return what sorts the values of an order column: numbers, also as texts, or dates and times in ISO 8601.

    Raises:
        TaskError: they are neither, or of both kinds, so that no order is meant.
    """
    for read in (_number, _time):
        found = [read(value) for value in values]
        if all(moment is not None for moment in found):
            return [moment for moment in found if moment is not None]
    wrong = next((value for value in values if _number(value) is None and _time(value) is None), None)
    if wrong is not None or None in values:
        raise TaskError(
            f"{wrong!r:.60} is neither a number nor a date in ISO 8601, so that it has no place in an order"
        )
    raise TaskError(f"numbers and dates side by side ({values[0]!r:.40} …) have no order")


def odd_one(values: Sequence[Any]) -> tuple[int, int, tuple[str, str]] | None:
    """Find a value of an order column that is of another clock than others; None where there is none.

    A time without a zone among others with one may be hours off. Numbers are of two clocks where each is a day of
    `YEARS`, one by seconds since 1970 and another by milliseconds; others count what they may.

    Args:
        values: all that `moments` takes.

    Returns:
        Which one it is, the first of the rarer kind; which is one of the others; and the clocks of the two, in words.
    """
    clocks = [clock for clock in map(_clock, values) if clock is not None]
    counts = Counter(clocks)
    if len(counts) < 2 or len(clocks) < len(values):
        return None
    rare = min(counts, key=lambda clock: (counts[clock], clocks.index(clock)))
    at, other = clocks.index(rare), next(at for at, clock in enumerate(clocks) if clock != rare)
    return at, other, (rare, clocks[other])


def _clock(value: Any) -> str | None:
    """Return which clock a value is of, in words; None for a number that is no day of `YEARS` by any of them."""
    number = _number(value)
    if number is not None:
        fitting = (unit for unit, size in CLOCKS.items() if YEARS[0] * size <= number <= YEARS[1] * size)
        return next(fitting, None)
    return "with a time zone" if _is_zoned(value) else "without a time zone"


def _is_zoned(value: Any) -> bool:
    if isinstance(value, str):
        value = datetime.fromisoformat(value.strip().replace("Z", "+00:00"))
    return isinstance(value, datetime) and value.tzinfo is not None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if number == number else None


def _time(value: Any) -> float | None:
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value.strip().replace("Z", "+00:00"))
        except ValueError:
            return None
    if hasattr(value, "toordinal") and not isinstance(value, datetime):  # a date alone
        value = datetime(value.year, value.month, value.day)
    if not isinstance(value, datetime):
        return None
    return (value if value.tzinfo else value.replace(tzinfo=timezone.utc)).timestamp()
