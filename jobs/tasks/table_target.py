"""Whether the target of a table is a label or an amount. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np

from jobs.tasks import TaskError
from jobs.tasks.row_sample import RowSample
from jobs.tasks.table_findings import ColumnFindings

Kind = Literal["classification", "regression"]
FEW = 20
"""With more different whole numbers than this, they are amounts."""
OFTEN = 5
"""So many rows each label has at least, on average, where numbers are taken as labels."""
TOLD = 20
"""With fewer rows, two columns may agree by chance."""


def kind_of_target(
    name: str, found: ColumnFindings, wished: Literal["auto", "classification", "regression"]
) -> tuple[Kind, list[str]]:
    """Decide what the target is, and say it.

    Raises:
        TaskError: it cannot be what was wished for, or neither.
    """
    if found.forms["date"] and wished != "classification":
        raise TaskError(
            f"column {name!r}, the target, holds dates, which are no amounts: give the days from a fixed date, or from "
            "a date of the row"
        )
    if wished == "regression" and not found.forms["number"]:
        raise TaskError(f"task.kind is regression, and column {name!r}, the target, holds no number")
    if wished != "auto":
        return wished, []
    others = found.number_of("flag", "text", "marked")
    numbers = found.forms["number"]
    if others and numbers >= others:
        raise TaskError(
            f"column {name!r}, the target, holds {numbers} numbers and {others} other values: say with task.kind "
            "whether they are classification or regression; with the latter, rows with other values are refused"
        )
    if others:
        return "classification", []
    different = found.numbers.counts
    if found.whole < numbers or different is None:
        return "regression", [f"regression: {name!r} holds numbers"]
    if len(different) == 2 or (len(different) <= FEW and numbers >= OFTEN * len(different)):
        return "classification", [
            f"classification: {name!r} holds {len(different)} different whole numbers, taken as labels; if they are "
            "amounts, say task.kind: regression"
        ]
    return "regression", [
        f"regression: {name!r} holds {len(different)} different whole numbers, taken as amounts; if they are labels, "
        "say task.kind: classification"
    ]


def telling(sample: RowSample, target: str, names: Iterable[str]) -> list[str]:
    """Return a sentence on each column of numbers or dates that is the target in another unit, in all rows drawn."""
    answers = sample.values[target]
    told = [name for name in names if name in sample.values and _is_same(sample.values[name], answers)]
    return [
        f"column {name!r} tells {target!r} exactly, whatever the other columns are: leave it out with task.ignore, "
        "unless it will be known where there is no answer yet"
        for name in told
    ]


def _is_same(values: np.ndarray, answers: np.ndarray) -> bool:
    """Tell whether answers (n,) are a line over values (n,), of the rows that have both."""
    both = ~(np.isnan(values) | np.isnan(answers))
    if both.sum() < TOLD:
        return False
    x, y = (side[both] / max(np.abs(side[both]).max(), 1e-300) for side in (values, answers))
    x, y = x - x.mean(), y - y.mean()
    size = float(np.sqrt((x**2).sum() * (y**2).sum()))
    return size > 0 and abs(float((x * y).sum())) > (1 - 1e-9) * size


def labels_of(name: str, found: ColumnFindings) -> frozenset[str]:
    """Return the labels.

    Raises:
        TaskError: there are too many, or none occurs twice.
    """
    names, numbers = found.names.counts, found.numbers.counts
    if names is None or numbers is None:
        raise TaskError(f"column {name!r}, the target, has too many different values to be labels; see task.kind")
    labels = frozenset({**names, **numbers})
    if len(labels) == found.present and len(labels) > 2:
        raise TaskError(
            f"column {name!r}, the target, is different in each of {found.present} rows: no label can be learned"
        )
    return labels
