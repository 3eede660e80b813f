"""Raw examples, and what holds them: the plain data between sources, preparation and the tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from cluster.errors import UserError


class Example(dict[str, Any]):
    """One raw example: named fields, and where they are from, for error messages (`train.jsonl:17`)."""

    __slots__ = ("where",)

    def __init__(self, fields: dict[str, Any], where: str = "") -> None:
        super().__init__(fields)
        self.where = where

    def __reduce__(self) -> tuple[Any, ...]:
        return Example, (dict(self), self.where)


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: where it is, and what is wrong with it."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


Rows = Iterator[Example | BadRow]


class BadRows:
    """What becomes of rows that cannot be used: the first one ends the job, or they are left out and counted."""

    KEPT = 20
    """So many are remembered by name."""

    def __init__(self, most: int = 0, seen_before: bool = False) -> None:
        """Put up with `most` of them, or with all where an earlier reading has counted them."""
        self._most, self._seen_before = most, seen_before
        self.count = 0
        self.first: list[BadRow] = []

    def add(self, row: BadRow) -> None:
        """Count one.

        Raises:
            UserError: it is one too many.
        """
        if self._seen_before:
            return
        self.count += 1
        self.first = [*self.first, row][: self.KEPT]
        if not self._most:
            raise UserError(f"{row}; with data.bad_rows: skip it would be left out and counted")
        if self.count > self._most:
            raise UserError(f"{row}; it is bad row number {self.count}, and data.max_bad_rows is {self._most}")


@dataclass(frozen=True)
class Source:
    """Raw examples with where they are from (`name`) and what they are (`digest`, SHA-256 hex of the content)."""

    name: str
    digest: str
    read: Callable[[], Rows]

    def examples(self, limit: int | None = None, bad: BadRows | None = None) -> Iterator[Example]:
        """Read the examples one by one, at most `limit`; rows that cannot be read go to `bad` (None: end the job).

        Raises:
            UserError: there is no example, or a file or a row cannot be read; the message names file and line.
        """
        found = 0
        bad = bad or BadRows()
        for item in self.read():
            if isinstance(item, BadRow):
                bad.add(item)
                continue
            found += 1
            yield item
            if found == limit:
                break
        if not found:
            raise UserError(f"data: {self.name} holds no example{f' but {bad.count} bad rows' if bad.count else ''}")
