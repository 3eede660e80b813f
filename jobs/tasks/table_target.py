"""Whether the target of a table is a label or an amount. Pure."""

from __future__ import annotations

from typing import Literal

from jobs.tasks import TaskError
from jobs.tasks.table_findings import ColumnFindings

Kind = Literal["classification", "regression"]
FEW = 20
"""With more different whole numbers than this, they are amounts."""
OFTEN = 5
"""So many rows each label has at least, on average, where numbers are taken as labels."""


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
