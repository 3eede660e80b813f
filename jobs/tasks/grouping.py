"""How rows of a table become examples: all rows of a user, of a series, one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from jobs.tasks import TaskError


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
