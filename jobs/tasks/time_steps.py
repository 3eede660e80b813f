"""The steps of a time series: what lies between two stamps, which step a stamp is, how long a season lasts.

Stamps are numbers, or dates and times in ISO 8601. A step is a number, seconds, or months of the calendar.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any, Literal

from jobs.tasks import TaskError
from jobs.tasks.grouping import moments

Unit = Literal["number", "second", "month"]
UNITS: dict[str, tuple[Unit, int]] = {
    "second": ("second", 1),
    "minute": ("second", 60),
    "hour": ("second", 3600),
    "day": ("second", 86_400),
    "week": ("second", 604_800),
    "month": ("month", 1),
    "quarter": ("month", 3),
    "year": ("month", 12),
}
"""Names of steps → what they count, and how many of it."""
CYCLES: dict[Unit, tuple[tuple[int, int, int], ...]] = {
    "second": (
        (1, 60, 3600),
        (60, 86_400, 86_400),
        (86_400, 604_800, 604_800),
        (604_800, 52 * 604_800, 52 * 604_800),
    ),
    "month": ((1, 12, 12),),
    "number": (),
}
"""Steps from a size to below another one → a season's size: seconds' is an hour, hours' a day, days' a week."""
ROUNDING = 1e-6
DAY = timedelta(days=1)


@dataclass(frozen=True)
class Step:
    """What lies between two neighbouring stamps."""

    unit: Unit
    size: float

    def __str__(self) -> str:
        """Return it in words, as `parsed` reads them."""
        named = [(name, count) for name, (unit, count) in UNITS.items() if unit == self.unit and not self.size % count]
        if not named:
            return f"{self.size:g}" if self.unit == "number" else f"{self.size:g} {self.unit}s"
        name, count = named[-1]
        times = self.size / count
        return name if times == 1 else f"{times:g} {name}s"

    def season(self) -> int:
        """Return how many steps a season has, as people's calendars have it; 1 where none is known."""
        cycles = [cycle for least, below, cycle in CYCLES[self.unit] if least <= self.size < below]
        return int(cycles[0] / self.size) if cycles and not cycles[0] % self.size else 1


def parsed(text: str) -> Step:
    """Read a step: hour, 15 minutes, month, or a number.

    Raises:
        ValueError: it is none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)?\s*([a-z]+?)?s?\s*", text)
    count, name = found.groups() if found else (None, None)
    if (count is None and name is None) or (name is not None and name not in UNITS) or not float(count or 1) > 0:
        raise ValueError(f"{text!r} is no step: a number, or one of {', '.join(UNITS)}, as in 15 minutes")
    if name is None:
        return Step("number", float(count or 1))
    unit, size = UNITS[name]
    whole = float(count or 1) * size
    if unit == "month" and whole % 1:
        raise ValueError(f"{text!r} is no whole number of months")
    return Step(unit, whole)


def inferred(stamps: Sequence[Any]) -> Step | None:
    """Return the usual step between sorted stamps; None where fewer than three say too little."""
    if len(stamps) < 3:
        return None
    months = _months(stamps)
    if months is not None:
        return Step("month", float(_usual(months)))
    when = moments(list(stamps))
    return Step("number" if _are_numbers(stamps) else "second", _usual(when))


def places(stamps: Sequence[Any], step: Step | None) -> list[int]:
    """Return which step each of sorted stamps is, from 0 for the first.

    Args:
        step: None where a series of one or two stamps has none of its own: it is as long as their distance.

    Raises:
        TaskError: a stamp comes twice, or lies between two steps, or is a number where the step is one of time.
    """
    when = moments(list(stamps))
    twice = next((at for at in range(1, len(when)) if when[at] == when[at - 1]), None)
    if twice is not None:
        raise TaskError(f"the time {stamps[twice]!r:.40} comes twice in a series")
    if step is None:
        return list(range(len(stamps)))
    if (step.unit == "number") != _are_numbers(stamps):
        raise TaskError(f"the time {stamps[0]!r:.40} does not go with steps of {step}: one is a number")
    months = _months(stamps) if step.unit == "month" else None
    if step.unit == "month" and months is None:
        raise TaskError(f"the times from {stamps[0]!r:.40} on are not on one day of their months: no steps of {step}")
    counted = [float(month) for month in months] if months is not None else when
    exact = [(moment - counted[0]) / step.size for moment in counted]
    off = next((at for at, place in enumerate(exact) if abs(place - round(place)) > ROUNDING * max(1.0, place)), None)
    if off is not None:
        raise TaskError(
            f"the time {stamps[off]!r:.40} lies {exact[off] - exact[off - 1]:.6g} steps of {step} behind the last: "
            "a series has one stamp a step (task.frequency says how long that is)"
        )
    return [round(place) for place in exact]


def _are_numbers(stamps: Sequence[Any]) -> bool:
    try:
        [float(stamp) for stamp in stamps]
    except (TypeError, ValueError):
        return False
    return True


def _usual(ordered: Sequence[float]) -> float:
    """Return the most frequent distance between neighbours, the smallest of several; 1 where there is none."""
    gaps = Counter(later - earlier for earlier, later in pairwise(ordered) if later > earlier)
    return min(gaps, key=lambda gap: (-gaps[gap], gap), default=1.0)


def _months(stamps: Sequence[Any]) -> list[int] | None:
    """Return months since year 0, where all stamps are on the same day and hour of their months, or on the last day."""
    if _are_numbers(stamps):
        return None
    dates = [_date(stamp) for stamp in stamps]
    clocks = {date.time() for date in dates}
    same = len({date.day for date in dates}) == 1 or all((date + DAY).day == 1 for date in dates)
    months = [12 * date.year + date.month for date in dates]
    return months if same and len(clocks) == 1 and len(set(months)) == len(months) else None


def _date(stamp: Any) -> datetime:
    if isinstance(stamp, datetime):
        return stamp
    if isinstance(stamp, str):
        return datetime.fromisoformat(stamp.strip().replace("Z", "+00:00"))
    return datetime(stamp.year, stamp.month, stamp.day)
