"""Columns and labels of raw examples, as classifiers read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from jobs.tasks import TaskError
from jobs.tasks.architectures import close

NAMED = 20
"""So many labels are named."""


def column_of(example: Mapping[str, Any], name: str, option: str) -> Any:
    """Return what an example holds in the column `name`, which the task's option `option` names.

    Raises:
        TaskError: it has no such column; the message names those it has.
    """
    if name in example:
        return example[name]
    hint = f"{close(name, example)}; name the column in task.{option}"
    raise TaskError(f"no column {name!r}; this example has {sorted(example)}{hint}")


def label_of(example: Mapping[str, Any], name: str) -> str:
    """Return the label in the column `name`.

    A label is a text, or a whole number or a truth value, which are known by their digits or name.

    Raises:
        TaskError: it is missing, empty, or something else.
    """
    label = column_of(example, name, "label_column")
    whole = isinstance(label, float | Decimal) and label == label and label % 1 == 0  # what nulls make of integers
    if whole:
        return str(int(label))
    if not isinstance(label, str | int) or not str(label).strip():
        kind = ": a label is a text or a whole number" if isinstance(label, float | Decimal | bytes) else ""
        raise TaskError(f"column {name!r} holds {label!r:.60}, which is no label{kind}")
    return str(label)


def natural(label: str) -> tuple[int, int, str]:
    """Return what sorts labels: numbers by their value, before words."""
    return (0, int(label), "") if label.isdecimal() else (1, 0, label)


def said_of(labels: Sequence[str]) -> str:
    """Name the labels, in one sentence, and those that only differ by case or blanks, which are classes apart."""
    named = ", ".join(label if label == label.strip() else repr(label) for label in labels[:NAMED])
    alike: dict[str, list[str]] = {}
    for label in labels:
        alike.setdefault(" ".join(label.split()).casefold(), []).append(label)
    near = [" and ".join(map(repr, group)) for group in alike.values() if len(group) > 1]
    warning = f"; differ by case or blanks alone, and are classes apart: {', '.join(near[:NAMED])}" if near else ""
    return f"{len(labels)} labels: {named}{', …' if len(labels) > NAMED else ''}{warning}"


def classified(labels: Sequence[str]) -> list[dict[str, Any]]:
    """Describe the outputs of a classifier, as in the Open Inference Protocol: label, score, and a score per label."""
    return [
        {"name": "label", "datatype": "BYTES", "shape": [-1]},
        {"name": "score", "datatype": "FP32", "shape": [-1]},
        {"name": "scores", "datatype": "FP32", "shape": [-1, len(labels)], "parameters": {"labels": list(labels)}},
    ]
