"""Rows of a table as a network reads them, and what a client may send in their place. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jobs.tasks import Columns, TaskError
from jobs.tasks.table_columns import UNKNOWN, Column

LISTED = 50
"""With more categories than this, the metadata of the model does not name them."""


def encoded(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> Columns:
    """Return numbers (N, C) float32, missing (N, C) uint8 and categories (N, K) int32, those that there are.

    Raises:
        TaskError: a value is none of its column.
    """
    numbers, missing, categories = [], [], []
    for column in columns:
        cells = [column.cell(row) for row in rows]
        if column.kind == "category":
            categories.append(column.numbered(rows, cells))
        else:
            scaled, gone = column.scaled(cells)
            numbers.append(scaled)
            missing.append(gone)
    found = {"numbers": numbers, "missing": missing, "categories": categories}
    return {name: np.stack(parts, 1) for name, parts in found.items() if parts}


def newly(rows: Columns, columns: Sequence[Column]) -> Columns:
    """Return which of N encoded rows hold an unknown category, or lack what none in training lacked: (N,) int32."""
    count = len(rows["targets"])
    strange = unknown(rows) if "categories" in rows else np.zeros(count, bool)
    lacking = np.zeros(count, bool)
    if "missing" in rows:
        lacking |= (rows["missing"].astype(bool) & _never_missing(columns)).any(1)
    return {"unknown": strange.astype(np.int32), "newly_missing": lacking.astype(np.int32)}


def unknown(rows: Columns) -> np.ndarray:
    """Return which of N encoded rows with categories (N, K) hold one not told apart from unseen ones: (N,) bool."""
    strange: np.ndarray = (rows["categories"] == UNKNOWN).any(1)
    return strange


def asked(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> Columns:
    """Encode N rows that are to be answered, as `encoded` does: arrays (N, …).

    Raises:
        TaskError: as `encoded`; or a value is missing that none in training was without.
    """
    found = encoded(rows, columns)
    if "missing" in found:
        newly_missing = (found["missing"].astype(bool) & _never_missing(columns)).any(0)
        if newly_missing.any():
            named = [column.name for column in columns if column.kind != "category"]
            _refuse_missing(named[int(newly_missing.argmax())])
    for column in columns:
        named_always = column.kind == "category" and not column.missing
        if named_always and any(column.cell(row).form == "missing" for row in rows):
            _refuse_missing(column.name)
    return found


def given(instance: Any, columns: Sequence[Column]) -> Mapping[str, Any]:
    """Return the row that a client has sent: a mapping of column to value, or of a single column the value itself.

    Raises:
        TaskError: it is no row of these columns.
    """
    if not isinstance(instance, Mapping):
        if len(columns) > 1:
            raise TaskError(f"a row is a mapping of column to value, this is {instance!r:.60}")
        instance = {columns[0].name: instance}
    row: dict[str, Any] = {column.name: None for column in columns if column.missing or column.lacking}
    row |= {name: _text(value, name) for name, value in instance.items()}
    if strange := sorted(row.keys() - {column.name for column in columns}):
        raise TaskError(f"the model reads no column {strange[0]!r}")
    return row


def tensor(column: Column) -> dict[str, Any]:
    """Describe the input tensor of a column, as in the Open Inference Protocol."""
    holds = {"number": "numbers", "date": "dates (2024-12-31)"}.get(column.kind, "names")
    parameters: dict[str, Any] = {"holds": holds}
    if column.kind == "category" and len(column.categories) <= LISTED:
        parameters["categories"] = list(column.categories)
    if column.missing or column.lacking:
        parameters |= {"optional": True, "missing": "left out" if column.kind == "number" else "left out or empty"}
    datatype = "FP64" if column.kind == "number" else "BYTES"
    return {"name": column.name, "datatype": datatype, "shape": [-1], "parameters": parameters}


def _never_missing(columns: Sequence[Column]) -> np.ndarray:
    """Return which of the C columns of numbers were never empty in training, (C,) bool."""
    return np.array([not column.missing for column in columns if column.kind != "category"])


def _refuse_missing(name: str) -> None:
    raise TaskError(f"column {name!r} is empty, and no row in training was: give a value")


def _text(value: Any, name: str) -> Any:
    """Return what a client has sent; bytes are text.

    Raises:
        TaskError: they are no UTF-8.
    """
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise TaskError(f"column {name!r} holds bytes that are no text in UTF-8: {error.reason}") from None
