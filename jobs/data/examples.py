"""Raw examples, and what holds them: the plain data between sources, preparation and the tasks."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from cluster.errors import UserError
from jobs import progress
from jobs.tasks import TaskSetupError

Made = TypeVar("Made")
REASON_CHARS = 300


class Example(dict[str, Any]):
    """One raw example: named fields, and where they are from, for error messages (`train.jsonl:17`).

    It is `padded` where a null in one of its mappings may stand for an entry that is not there: Arrow gives each
    mapping of a column the keys of all.
    """

    __slots__ = ("padded", "where")

    def __init__(self, fields: dict[str, Any], where: str = "", padded: bool = False) -> None:
        super().__init__(fields)
        self.where, self.padded = where, padded

    def __reduce__(self) -> tuple[Any, ...]:
        return Example, (dict(self), self.where, self.padded)


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: where it is, and what is wrong with it."""

    where: str
    reason: str
    trace: str = ""
    """The traceback, where the reason is an exception that nobody foresaw: it may be a fault of the task's own code."""

    def __str__(self) -> str:
        return printable(f"{self.where}: {self.reason}")


def unread(where: str, reason: str) -> BadRow:
    """Return the one bad row that a whole file is, none of whose rows can be read."""
    return BadRow(where, f"{reason}; nothing of the file can be read, and how many rows it holds is not known")


def printable(text: str) -> str:
    """Return a text that any terminal and file takes: names of files need not be UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


def kind_of(reason: str) -> str:
    """Return a bad row's reason without what is the row's own: numbers, and what is quoted behind the first name."""
    first, *others = re.split(r"(?<=')(?=\W)", reason, maxsplit=1)
    return re.sub(r"\d+", "0", first + "".join(re.sub(r"'[^']*'|\([^)]*\)", "…", other) for other in others))


Rows = Iterator[Example | BadRow]


def bounded(work: Callable[[], Made], where: str) -> Made | BadRow:
    """Do `work` on the one row at `where`: the boundary that no exception of a row's own passes.

    Raises:
        TaskSetupError: the task as a whole cannot work, which is no row's fault.
        MemoryError: nor is this.
    """
    try:
        return work()
    except (TaskSetupError, MemoryError):
        raise
    except UserError as error:
        return BadRow(where, str(error))
    except Exception as error:  # whatever a reader, a template, a decoder of images or a task of the user's raises
        said = " ".join(str(error).split())[:REASON_CHARS]
        return BadRow(where, f"{type(error).__name__}: {said}" if said else type(error).__name__, _shown(error))


class BadRows:
    """What becomes of rows that cannot be used: the first one ends the job, or they are left out and counted."""

    KEPT = 20
    """So many are remembered by name."""

    def __init__(self, most: int = 0, seen_before: bool = False, own_code: bool = False) -> None:
        """Put up with `most` of them, or with all where an earlier reading has counted them.

        Where a user's own code works on them, what it did not foresee is shown with its traceback, each kind once.
        """
        self._most, self._seen_before, self._own_code = most, seen_before, own_code
        self._traces: set[str] = set()
        self.count = 0
        self.first: list[BadRow] = []
        self._kinds: dict[str, tuple[int, BadRow]] = {}

    def add(self, row: BadRow) -> None:
        """Count one.

        Raises:
            UserError: it is one too many.
        """
        if self._seen_before:
            return
        self.count += 1
        self.first = [*self.first, row][: self.KEPT]
        self._sort(row)
        self._show(row)
        if not self._most:
            raise UserError(f"{row}; with data.bad_rows: skip it would be left out and counted")
        if self.count > self._most:
            raise UserError(f"{row}; it is bad row number {self.count}, and data.max_bad_rows is {self._most}")

    def other_reasons(self) -> list[str]:
        """Say how many rows are left out for another reason than the first one is, and one of each kind; most first."""
        others = sorted(list(self._kinds.values())[1:], key=lambda kind: -kind[0])
        return [f"{count} of them for another reason, as {row}" for count, row in others]

    def _sort(self, row: BadRow) -> None:
        kind = kind_of(row.reason)
        if kind not in self._kinds and len(self._kinds) == self.KEPT:
            kind = next(reversed(self._kinds))  # the last one stands for all that are too many to be told apart
        count, example = self._kinds.get(kind, (0, row))
        self._kinds[kind] = count + 1, example

    def _show(self, row: BadRow) -> None:
        kind = row.trace.rpartition("\n")[0]  # the last line may hold the row's own content
        if self._own_code and row.trace and kind not in self._traces and len(self._traces) < self.KEPT:
            self._traces.add(kind)
            progress.say(f"{row.where} failed so:\n{row.trace}")


@dataclass(frozen=True)
class Cut:
    """A part of a file that can be read by itself."""

    start: int
    """Where it begins: a byte of a file of lines, a row group of a Parquet file."""
    end: int
    """Where the next one begins."""
    before: int
    """How many lines, or rows, of the file are before it."""
    size: int
    """Bytes."""


@dataclass(frozen=True)
class Source:
    """Raw examples, with where they are from and what they are."""

    name: str
    digest: str
    """SHA-256 (hex) of the content, every byte of it."""
    read: Callable[[], Rows]
    reading: str = ""
    """How the content is read: kinds of files, versions of the readers."""
    notes: tuple[str, ...] = ()
    """Sentences for the log: what is there but is not read."""
    names_files: bool = False
    """True where its rows may name files that a task opens."""
    tables: bool = False
    """True where `data.columns` may name the columns: CSV and TSV."""
    origin: str = ""
    """The real path, or the name: two sources of one origin are one. "" where it is made of several."""
    parts: tuple[Source, ...] = ()
    """The single sources that it is made of; none where it is a single one itself."""
    size: int | None = None
    """Bytes of the file, or of the part of it; None where it is no file."""
    cuts: tuple[Cut, ...] = ()
    """The parts that the file can be read in; none where it is read as a whole."""
    read_cut: Callable[[Cut], Rows] | None = None
    """Reads one of `cuts`."""
    is_cut: bool = False
    """True where it is one of a file's parts."""
    mixed: tuple[Source, ...] = ()
    """The sources of a mixture, whose rows stay apart, if it is one."""

    @property
    def singles(self) -> tuple[Source, ...]:
        """What it is made of: files, folders of images, data sets; itself where it is one of these."""
        return self.parts or (self,)

    def examples(
        self, limit: int | None = None, bad: BadRows | None = None, empty: list[str] | None = None
    ) -> Iterator[Example]:
        """Read the examples one by one, at most `limit`; rows that cannot be read go to `bad` (None: end the job).

        Args:
            empty: gets the names of the parts that hold nothing at all.

        Raises:
            UserError: there is no example, or a file or a row cannot be read; the message names file and line.
        """
        found, bad = 0, bad or BadRows()
        for example in self.found(limit, bad, empty):
            found += 1
            yield example
        if not found:
            raise self.nothing(bad)

    def found(self, limit: int | None, bad: BadRows, empty: list[str] | None) -> Iterator[Example]:
        """Read the examples as `examples` does, or none where there are none.

        Of a file that is read in parts it cannot be told here whether it is `empty`.

        Raises:
            UserError: a file cannot be read, or there is one bad row too many.
        """
        found = 0
        for part in self.singles:
            if found == limit:
                break
            items = 0
            for item in part.read():
                items += 1
                if isinstance(item, BadRow):
                    bad.add(item)
                    continue
                found += 1
                yield item
                if found == limit:
                    break
            if not items and empty is not None and not part.is_cut:
                empty.append(part.name)

    def nothing(self, bad: BadRows) -> UserError:
        """Say that there is no example."""
        seen = f" but {bad.count} bad rows; the first: {bad.first[0]}" if bad.count else ""
        left_out = "".join(f"; {note}" for note in self.notes)
        return UserError(f"data: {self.name} holds no example{seen}{left_out}")


def _shown(error: Exception) -> str:
    """Return the traceback without the end's many lines: a RecursionError has a thousand."""
    return "".join(traceback.format_exception(type(error), error, error.__traceback__, limit=-12, chain=False)).rstrip()
