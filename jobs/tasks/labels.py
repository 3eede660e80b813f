"""Columns and labels of raw examples, as classifiers read them."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence, Set
from decimal import Decimal, InvalidOperation
from typing import Any, TypeVar

from jobs.tasks import TaskError
from jobs.tasks.architectures import close
from jobs.tasks.messages import is_blank, text_of

Checked = TypeVar("Checked")
Chosen = TypeVar("Chosen")
EXACT = 2**53
"""From here on, two whole numbers may be one floating-point number."""


def check_columns(options: Checked, *names: str) -> Checked:
    """Return options whose columns, named by `names`, are different ones.

    Raises:
        ValueError: two are the same, so that the answer would stand in the question.
    """
    given = [(name, column) for name in names if (column := getattr(options, name)) is not None]
    first = {column: name for name, column in reversed(given)}
    twice = next(((name, column) for name, column in given if first[column] != name), None)
    if twice is not None:
        raise ValueError(f"{first[twice[1]]} and {twice[0]} are both {twice[1]!r}")
    return options


def chosen(given: Chosen | None, otherwise: Chosen) -> Chosen:
    """Return what an option says, or what holds where it is left out: a checked spec has every option, given or not."""
    return otherwise if given is None else given


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

    A label is a text that can be seen, or a whole number or a truth value, which are known by their digits or name.

    Raises:
        TaskError: it is missing, empty, or something else.
    """
    label = column_of(example, name, "label_column")
    if _is_whole(label):
        return str(int(label))
    if not isinstance(label, str | int) or is_blank(str(label)):
        kind = ": a label is a text or a whole number" if isinstance(label, float | Decimal | bytes) else ""
        raise TaskError(f"column {name!r} holds {label!r:.60}, which is no label{kind}")
    return text_of(label, name) if isinstance(label, str) else str(label)


def _is_whole(label: Any) -> bool:
    """Tell whether a number is a whole one, as nulls make of integers, of which every digit is known."""
    if isinstance(label, Decimal):
        return label.is_finite() and label % 1 == 0
    return isinstance(label, float) and abs(label) < EXACT and label % 1 == 0


def kind_of(label: Any) -> str:
    """Return what a label that `label_of` takes is, in words."""
    return "text" if isinstance(label, str) else "true or false" if isinstance(label, bool) else "numbers"


def said_of(labels: Sequence[str], kinds: Set[str]) -> list[str]:
    """Return sentences for the log: which labels there are, and what may be wrong with them.

    Args:
        labels: the labels, sorted.
        kinds: what `kind_of` says of them.
    """
    named = ", ".join(label if label == _visible(label).strip() else repr(label) for label in labels[:20])
    said = [f"{len(labels)} labels: {named}{', …' if len(labels) > 20 else ''}"]
    if len(kinds) > 1:
        said.append(f"labels come as {' and as '.join(sorted(kinds))}: those that read alike are one label")
    return said + alike(labels, "labels")


def alike(names: Sequence[str], what: str) -> list[str]:
    """Return a sentence for the log on those of the names that people read as one; none where there are none.

    Args:
        what: what they name, in the plural.
    """
    spoken: dict[str, list[str]] = {}
    for name in names:
        spoken.setdefault(_spoken(name), []).append(name)
    groups = [" and ".join(map(repr, group)) for group in spoken.values() if len(group) > 1]
    rest = "; …" if len(groups) > 5 else ""
    return [f"{what} that look alike are told apart: {'; '.join(groups[:5])}{rest}"] if groups else []


def unknown_of(labels: Sequence[str], known: Sequence[str]) -> str | None:
    """Say which labels are not among those that are known; None where all are."""
    unknown = sorted(set(labels) - set(known))
    if not unknown:
        return None
    return (
        f"labels {unknown[:5]} are not among the {len(known)} labels of the training data (a rare one may be held out "
        "whole: another data.split_seed holds out others)"
    )


def _spoken(label: str) -> str:
    """Return a label as people read it: without what cannot be seen, case, ways to write a letter or a number."""
    plain = " ".join(_visible(unicodedata.normalize("NFKC", label)).split()).casefold()
    try:
        return str(Decimal(plain).normalize())
    except InvalidOperation:
        return plain


def _visible(label: str) -> str:
    """Return a label without the characters that take no place, such as a zero-width space."""
    return "".join(character for character in label if unicodedata.category(character) != "Cf")


def natural(label: str) -> tuple[int, int, str]:
    """Return what sorts labels, each at a place of its own: numbers by their value, before words."""
    return (0, int(label), label) if label.isdecimal() else (1, 0, label)


def classified(labels: Sequence[str]) -> list[dict[str, Any]]:
    """Describe the outputs of a classifier, as in the Open Inference Protocol: label, score, and a score per label."""
    return [
        {"name": "label", "datatype": "BYTES", "shape": [-1]},
        {"name": "score", "datatype": "FP32", "shape": [-1]},
        {"name": "scores", "datatype": "FP32", "shape": [-1, len(labels)], "parameters": {"labels": list(labels)}},
    ]
