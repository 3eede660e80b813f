"""The files of rows in the order in which a run with `data.start_early` visits them, as they become whole.

RUN/arrivals.jsonl   ["train-000004-00000.arrow", 812]   a file, and its rows: a line each, in order; where nodes share
                                                         no folder, and it is in the store until all are, its digest
                     "whole"                             there are no more
RUN/arrivals.beat    changes while the preparation goes on, where that is no folder's matter
RUN/arrivals.ended   the same list, renamed, which a full disk allows: no more come, the preparation has failed or was
                     given up

The order of files follows from their names and `training.seed`, so that it is the same whether they are there already
or still being made. The driver alone writes; every worker reads.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np

from cluster.errors import UserError
from jobs.data.rows import Rows

WHOLE = "whole"
TOGETHER = 16
"""Rows of so many files are shuffled with each other, about 64 MiB of raw data; fixed, as it decides the order."""
POLL_S = 0.2
BEAT_S = 1.0
Fetch = Callable[[str, str], object]
"""Has a file of rows, by name and digest, where the rows are looked for on this node."""
_RANGE = re.compile(r"-(\d{6})-\d+\.arrow$")


class NoMore(Exception):
    """Rows are waited for that will not come; every worker of a step finds the same."""


def place_of_range(seed: int, number: int) -> str:
    """Return by what the ranges of a source are sorted: a keyed hash, so that the data's own order does not matter."""
    return hashlib.sha256(f"shards {seed} {number}".encode()).hexdigest()


def in_order(files: Iterable[str], seed: int) -> list[str]:
    """Return files of rows to train on in the order of a run: range after range, each with its chunks in order."""

    def place(file: str) -> tuple[str, str]:
        found = _RANGE.search(file)
        return place_of_range(seed, int(found[1]) if found else 0), file

    return sorted(files, key=place)


def sign_of(path: str | Path) -> Callable[[], object]:
    """Return a function whose answer changes as long as the preparation goes on that writes this list."""

    def sign() -> tuple[int, ...]:
        found = [0, 0]
        with suppress(FileNotFoundError):  # no more come, as whoever waits finds out
            for each in (Path(path), _beat(Path(path))):
                of = os.stat(each)
                found += [of.st_size, of.st_mtime_ns]
        return tuple(found)

    return sign


def _ended(path: Path) -> Path:
    """Return what a list is called once no more come."""
    return path.with_suffix(".ended")


def _beat(path: Path) -> Path:
    """Return the file whose changes are signs of life where only what is in a file gets to other nodes."""
    return path.with_suffix(".beat")


class Arrivals:
    """The list, for the driver, which writes it."""

    def __init__(self, path: Path, *, carried: bool = False) -> None:
        """Begin it anew: of an earlier attempt at the job nothing holds. `carried`: nodes have copies of the list."""
        self.path, self._carried = path, carried
        self._beat_at = 0.0
        for earlier in (path, _ended(path), _beat(path)):
            earlier.unlink(missing_ok=True)
        path.touch()

    def add(self, file: str, rows: int, digest: str = "") -> None:
        """Add a file that is whole; `digest`: of its content, where it is in a store."""
        self._write([json.dumps([file, rows, *filter(None, [digest])])])

    def end(self) -> None:
        """Say that there are no more."""
        self._write([json.dumps(WHOLE)])

    def give_up(self) -> None:
        """Say that no more come. A storage that does not take even that is one that the workers have lost too."""
        with suppress(OSError):
            self.path.rename(_ended(self.path))

    def add_all(self, directory: Path, files: Iterable[str], seed: int) -> None:
        """Add the files of a data set that is whole."""
        counted = ((file, len(Rows([directory / file]))) for file in in_order(files, seed))
        self._write([*(json.dumps([file, rows]) for file, rows in counted), json.dumps(WHOLE)])

    def beat(self) -> None:
        """Give a sign of life to those that wait for the next file."""
        with suppress(OSError):
            if not self._carried:
                os.utime(self.path)
            elif time.monotonic() >= self._beat_at + BEAT_S:
                self._beat_at = time.monotonic()
                _beat(self.path).write_text(f"{time.time_ns()}", encoding="ascii")

    def _write(self, lines: list[str]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))


class Arriving(Rows):
    """Rows to train on, in the order of their files, as far as these have been needed.

    Its length is that of the first files whose rows are shuffled together: they alone are sure to be there, on any
    worker at any time.
    """

    def __init__(self, arrivals: Path, directory: Path, before: Path | None, fetch: Fetch | None = None) -> None:
        """Wait for the first files.

        Args:
            arrivals: their list.
            directory: the folder that they are in once all are whole.
            before: the one that they are in until then.
            fetch: where nodes share no folder, has one in it.

        Raises:
            NoMore: none come.
        """
        self._arrivals, self._directory, self._fetch = arrivals, directory, fetch
        self._read = 0
        self._waiting: list[tuple[str, int, str]] = []
        self._has_all = self._has_ended = False
        self.ends = np.zeros(0, dtype=np.int64)
        """Row numbers behind the last row of each group of files that are shuffled together, int64 (G,)."""
        super().__init__([], before=before)
        self._list: list[Path] = []
        self._files = [self._list]
        self.until(1)

    def __len__(self) -> int:
        return int(self.ends[0])

    @property
    def whole(self) -> bool:
        """True once no group follows."""
        return self._has_all and not self._waiting

    @property
    def count(self) -> int:
        """Rows of all groups that are known."""
        return int(self.ends[-1]) if len(self.ends) else 0

    @property
    def sign(self) -> Callable[[], object]:
        """What to ask for a sign of life of the preparation."""
        return sign_of(self._arrivals)

    def until(self, position: int) -> None:
        """Wait until the group is known that has the row before `position`, or all are.

        Raises:
            NoMore: it does not come.
        """
        while self.count < position and not self.whole:
            if self._next_group():
                continue
            self._look()
            if self._is_due():
                continue
            if self._has_ended:
                raise NoMore
            time.sleep(POLL_S)

    def _is_due(self) -> bool:
        """Tell whether the next group is complete, or there is none."""
        return len(self._waiting) >= TOGETHER or self._has_all

    def _next_group(self) -> bool:
        """Take the next group in, if its files are there."""
        if not self._is_due() or not self._waiting:
            return False
        files, self._waiting = self._waiting[:TOGETHER], self._waiting[TOGETHER:]
        for file, rows, digest in files:
            if self._fetch and digest:
                self._fetch(file, digest)
            self._take_in(self._directory / file, rows)
        self._starts = np.append(self._starts, self._starts[-1] + np.cumsum([rows for _, rows, _ in files]))
        self.ends = np.append(self.ends, self._starts[-1])
        return True

    def _take_in(self, path: Path, rows: int) -> None:
        self._list.append(path)
        columns = self._shard(len(self._list) - 1)
        assert len(next(iter(columns.values()))) == rows, f"{path.name} does not have {rows} rows"
        if len(self.ends) and (new := columns.keys() - self._fills.keys()):
            raise UserError(
                f"data.start_early: rows further on ({path.name}) have {', '.join(sorted(new))}, which none of the "
                "first ones has, and the model was looked at without: begin the run without start_early"
            )
        self._fills |= {name: np.zeros(c.shape[1:], c.dtype) for name, c in columns.items() if name not in self._fills}

    def _look(self) -> None:
        """Read the lines of the list that are new, as far as they are whole."""
        try:
            found = self._read_on(self._arrivals)
        except FileNotFoundError:
            found, self._has_ended = self._read_on(_ended(self._arrivals)), True
        lines = found[: found.rfind(b"\n") + 1]
        self._read += len(lines)
        for line in map(json.loads, lines.splitlines()):
            if line == WHOLE:
                self._has_all = True
            else:
                self._waiting.append((line[0], line[1], line[2] if len(line) > 2 else ""))

    def _read_on(self, path: Path) -> bytes:
        with path.open("rb") as file:
            file.seek(self._read)
            return file.read()
