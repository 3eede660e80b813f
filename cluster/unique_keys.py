"""JSON objects that say each thing once: of two values under one key, parsers keep the first or the last. Pure."""

from __future__ import annotations

import json
from typing import Any

from cluster.errors import UserError


class KeyTwice(UserError, ValueError):
    """An object has one key twice: `key`."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the key {json.dumps(key[:60], ensure_ascii=False)} is given twice in one object")
        self.key = key

    def __reduce__(self) -> tuple[type[KeyTwice], tuple[str]]:
        return type(self), (self.key,)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its pairs: what `json.loads` takes as `object_pairs_hook`.

    Raises:
        KeyTwice: a key is there twice; the message names it.
    """
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        raise KeyTwice(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return made
