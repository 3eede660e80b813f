"""What the cells of a table are: numbers, dates, names, or nothing. Pure, one cell at a time."""

from __future__ import annotations

import math
import re
from datetime import date, datetime, timezone
from decimal import Decimal
from typing import Any, Literal, NamedTuple

import numpy as np

from jobs.tasks import TaskError
from jobs.tasks.messages import is_blank

Form = Literal["missing", "marked", "number", "flag", "date", "text"]
"""What a cell is. `marked` is a text such as NA: a missing number, and a name among names."""

MARKS = frozenset({"na", "n/a", "#n/a", "#na", "<na>", "nan", "-nan", "null", "none", "nil", "?", "-"})
"""Texts that stand for a missing number, in lower case: those of pandas, and `?` and `-` of older tables."""
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?inf(inity)?", re.IGNORECASE | re.ASCII)
_ADORNED = re.compile(r"[^\w\s]?\s?[+-]?\d[\d.,'\u00a0 ]*\s?[^\w\s]?", re.ASCII)
"""A number as people write it: 1,234.50 or $5 or 12 %."""
_DATE = re.compile(r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d{3}(\d{3})?)?)?(Z|[+-]\d\d:?\d\d)?)?")
_ZONED = re.compile(r"[T ].*(Z|[+-]\d\d:?\d\d)$")
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


class Cell(NamedTuple):
    """A cell that was read."""

    form: Form
    number: float = math.nan
    """The value of a number, the days since 1970 of a date; NaN for what is neither."""


def read(value: Any, column: str) -> Cell:
    """Read one cell.

    Args:
        column: its name, for the message.

    Raises:
        TaskError: it is nothing that a cell of a table holds.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None:
        return Cell("missing")
    if isinstance(value, bool):
        return Cell("flag")
    if isinstance(value, int | float | Decimal):
        return _number(value, column)
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, date):
        return Cell("date", _days(value))
    raise TaskError(
        f"column {column!r} holds {value!r:.60}: a cell is a number, a text, true or false, a date, or empty; "
        "task.ignore leaves a column out"
    )


def spelling(value: Any) -> str:
    """Return what a cell that is not missing is called as a name: 7 and 7.0 are "7", True and "True" are "true".

    Texts are kept but for white space at their ends: 07 is another name than 7.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float | Decimal) and math.isfinite(value) and value % 1 == 0:
        return str(int(value))
    text = str(value).strip()
    return text.lower() if text.lower() in ("true", "false") else text


def is_zoned(value: Any) -> bool:
    """Tell whether a cell that is a date names a time zone, so that its moment is certain."""
    if isinstance(value, str):
        return _ZONED.search(value.strip()) is not None
    return isinstance(value, datetime) and value.tzinfo is not None


def is_adorned(value: Any) -> bool:
    """Tell whether a text is a number with separators or a unit, which nobody means as a name."""
    return isinstance(value, str) and _ADORNED.fullmatch(value.strip()) is not None


def _number(value: Any, column: str) -> Cell:
    try:
        number = float(value)
    except OverflowError:
        raise TaskError(f"column {column!r} holds a whole number of {len(str(value))} digits") from None
    except ValueError:  # Decimal's signalling NaN
        return Cell("missing")
    return Cell("missing") if math.isnan(number) else Cell("number", number)


def _text(value: str) -> Cell:
    text = value.strip()
    if not text or is_blank(text):
        return Cell("missing")
    if _NUMBER.fullmatch(text):
        return Cell("number", float(text))
    lower = text.lower()
    if lower in ("true", "false"):
        return Cell("flag")
    if lower in MARKS:
        return Cell("marked")
    if _DATE.fullmatch(text):
        try:
            return Cell("date", _days(datetime.fromisoformat(_as_python_has_it(text))))
        except ValueError:  # a 30th of February
            return Cell("text")
    return Cell("text")


def _as_python_has_it(text: str) -> str:
    """Return a date in the form that Python 3.10 reads too: an offset is +00:00."""
    text = text.replace("Z", "+00:00")
    return f"{text[:-2]}:{text[-2:]}" if re.search(r"[T ].*[+-]\d{4}$", text) else text


def _days(value: date) -> float:
    """Return the days since 1970; what names no time zone is taken as UTC."""
    moment = value if isinstance(value, datetime) else datetime(value.year, value.month, value.day)
    moment = moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
    return (moment - _EPOCH).total_seconds() / 86_400
