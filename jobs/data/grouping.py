"""Rows of a source, gathered into the examples of a task that learns from groups of them (jobs/tasks/grouping.py).

All rows of a source are in memory while they are gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from jobs.data.examples import BadRow, BadRows, Example, bounded
from jobs.tasks import TaskError
from jobs.tasks.grouping import Grouping, moments, odd_one
from jobs.tasks.labels import column_of


def grouped(
    rows: Iterable[Example | BadRow],
    grouping: Grouping,
    check: Callable[[Mapping[str, Any]], None],
    bad: BadRows,
    whole: bool = False,
) -> Iterator[Example]:
    """Yield an example for each group, in the order of their first rows; rows that cannot be used go to `bad`.

    Args:
        check: the task's own; it is given each row.
        whole: groups are to be answered: of a grouping that is `whole`, one with a row that cannot be used goes to
            `bad`, too.

    Raises:
        UserError: there is one bad row too many.
    """
    groups: dict[tuple[Any, ...], list[Example]] = {}
    texts: dict[str, bool] = {}
    lost: dict[tuple[Any, ...], BadRow] = {}
    for row in rows:
        key = row if isinstance(row, BadRow) else bounded(partial(_key, row, grouping, check, texts), row.where)
        if isinstance(key, BadRow):
            bad.add(key)
            if whole and grouping.whole:
                lost.setdefault(_named(row, grouping), key)
        elif isinstance(row, Example):
            groups.setdefault(key, []).append(row)
    for key in list(groups):
        members = groups.pop(key)
        example = bounded(partial(_example, members, grouping, lost.get(key)), members[0].where)
        if isinstance(example, BadRow):
            bad.add(example)
        else:
            yield example


def _key(
    row: Example, grouping: Grouping, check: Callable[[Mapping[str, Any]], None], texts: dict[str, bool]
) -> tuple[Any, ...]:
    """Return which group a row is of. `texts`: which columns named the groups so far by texts, which by numbers."""
    check(row)
    option = grouping.options.get
    key = tuple(column_of(row, name, option(name, "…_column")) for name in grouping.by)
    if grouping.order is not None:
        moments([column_of(row, grouping.order, option(grouping.order, "…_column"))])
    for name, value in zip(grouping.by, key, strict=True):
        if value == "" or value != value or isinstance(value, bool) or not isinstance(value, str | int | float):
            raise TaskError(f"column {name!r} holds {value!r:.60}, which names no group")
        is_text = isinstance(value, str)
        if texts.setdefault(name, is_text) != is_text:
            kinds = ("a text", "numbers") if is_text else ("a number", "texts")
            raise TaskError(f"column {name!r} holds {value!r:.60}, {kinds[0]} where rows before have {kinds[1]}")
    return key


def _named(row: Example | BadRow, grouping: Grouping) -> tuple[Any, ...]:
    """Return which group a row names that cannot be used, as far as it names one; where all are one, that."""
    values = (row.get(name) if isinstance(row, Example) else None for name in grouping.by)
    return tuple(value if isinstance(value, str | int | float) else None for value in values)


def _example(members: list[Example], grouping: Grouping, lost: BadRow | None) -> Example:
    if lost is not None:
        raise TaskError(f"it lacks the row {lost.where}, which cannot be used: what comes next would be another step")
    if grouping.order is not None:
        stamps = [row[grouping.order] for row in members]
        order = moments(stamps)
        if (odd := odd_one(stamps)) is not None:
            *both, clocks = odd
            held = (
                f"{stamps[at]!r:.40} ({members[at].where}), {clock}" for at, clock in zip(both, clocks, strict=True)
            )
            raise TaskError(f"column {grouping.order!r} holds {', beside '.join(held)}: write all times alike")
        members = [members[at] for at in sorted(range(len(members)), key=order.__getitem__)]
    columns = dict.fromkeys(column for row in members for column in row)
    lists = {name: [row.get(name) for row in members] for name in columns if name not in grouping.by}
    more = f" and {len(members) - 1} more" if len(members) > 1 else ""
    return Example({**{name: members[0][name] for name in grouping.by}, **lists}, f"{members[0].where}{more}")
