"""Columns of classes, as the library `datasets` describes them: numbers of names, of which -1 is none."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from jobs.data.remote import Place

NAMED = 10
"""So many names are said."""
NO_CLASS = -1
"""What `datasets` writes for an example without a label, as in the test sets of benchmarks."""


def features_of(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """Return what a Parquet file of `datasets` says of its columns; nothing where it is another's."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return features if isinstance(features, dict) else {}


def features_in(path: Place) -> dict[str, Any]:
    """Return `features_of` a Parquet file; nothing where it cannot be read, which its reader says."""
    import pyarrow
    import pyarrow.parquet

    try:
        opened = path if isinstance(path, Path) else path.native()
        return features_of(pyarrow.parquet.read_schema(opened).metadata)
    except (pyarrow.ArrowException, OSError, ValueError):
        return {}


def said_of_names(features: Mapping[str, Any]) -> tuple[str, ...]:
    """Say of the columns of classes which names their numbers stand for, since labels are the numbers."""
    said = []
    for column, names in sorted(_named(features)):
        if [str(number) for number in range(len(names))] != names:
            shown = ", ".join(f"{number}: {name}" for number, name in enumerate(names[:NAMED]))
            more = ", …" if len(names) > NAMED else ""
            said.append(f"the numbers in column {column!r} stand for names, which are not used ({shown}{more})")
    return tuple(said)


def _named(feature: Any, column: str = "") -> Iterator[tuple[str, list[str]]]:
    """Yield the columns of classes with their names, those within mappings and lists too, as `objects.category`."""
    if isinstance(feature, Mapping) and feature.get("_type") == "ClassLabel":
        yield column, list(feature.get("names") or [])
    elif isinstance(feature, Mapping):
        for key, part in feature.items():
            beneath = key == "feature" and "_type" in feature  # what a list's entries are
            yield from _named(part, column if beneath else f"{column}.{key}".lstrip("."))
    elif isinstance(feature, list):
        for part in feature:
            yield from _named(part, column)


def class_columns(features: Mapping[str, Any]) -> frozenset[str]:
    """Return the columns whose numbers stand for names."""
    kinds = {column: feature.get("_type") for column, feature in features.items() if isinstance(feature, Mapping)}
    return frozenset(column for column, kind in kinds.items() if kind == "ClassLabel")


def unlabelled(row: dict[str, Any], classes: Set[str]) -> dict[str, Any]:
    """Return a row with null in place of the number that stands for no class: it is not one more class."""
    return {key: None if key in classes and value == NO_CLASS else value for key, value in row.items()}
