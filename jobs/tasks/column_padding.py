"""Calls and tools out of columns of Arrow (Parquet, the hub), which give each mapping the keys of all, with nulls.

Such a null is no argument: a model would learn to write it. Nulls in JSON, also as a text in a column, are meant.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TURNS = ("messages", "conversations", "prompt", "completion", "chosen", "rejected")


def without_padding(example: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return an example without the nulls of its tools and of its calls' arguments; itself where there are none.

    Only of one that says that it is `padded` (jobs/data/examples.py).
    """
    if not getattr(example, "padded", False):
        return example
    changed = {key: _calls(example[key]) for key in _TURNS if key in example}
    if "tools" in example:
        changed["tools"] = _filled(example["tools"])
    return example if all(example[key] == value for key, value in changed.items()) else {**example, **changed}


def _calls(value: Any) -> Any:
    """Return turns with the arguments of their calls filled; these stand somewhere within."""
    if isinstance(value, list):
        return [_calls(entry) for entry in value]
    if isinstance(value, Mapping):
        return {key: _filled(entry) if key == "arguments" else _calls(entry) for key, entry in value.items()}
    return value


def _filled(value: Any) -> Any:
    """Return a value without the null entries of its mappings."""
    if isinstance(value, list):
        return [_filled(entry) for entry in value]
    if isinstance(value, Mapping):
        return {key: _filled(entry) for key, entry in value.items() if entry is not None}
    return value
