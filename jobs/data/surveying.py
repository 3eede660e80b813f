"""The first reading of a source, range by range, and what follows from it: what is held out, what is a copy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cluster.errors import UserError
from jobs.data import splitting, stream, tally, unfinished
from jobs.data.examples import BadRows, Source
from jobs.data.stream import NONE, Division, Survey
from jobs.data.tally import Hashes, Tally
from jobs.spec import DataSpec
from jobs.tasks import Task


@dataclass(frozen=True)
class Reading:
    """A source that a preparation reads, in its ranges."""

    name: str
    """train or held-out."""
    source: Source
    checker: Task
    """Needs no `fit`: it only checks."""
    limit: int | None
    """How many examples are read at most."""
    ranges: list[Source]
    folder: Path
    """Where the surveys of the ranges lie."""

    def survey_file(self, number: int) -> Path:
        """Return the place of a range's survey."""
        return self.folder / self.name / f"{number:06d}.npz"

    def none_usable(self, bad: BadRows) -> UserError:
        """Say that no example can be used."""
        return UserError(f"data: {self.source.name}: none of its {bad.count} examples can be used; {bad.first[0]}")


class Surveyed:
    """A source of which every range has been surveyed."""

    def __init__(self, reading: Reading, survey: Survey, counts: list[int], marks: np.ndarray | None) -> None:
        """Take what all ranges say together, how many examples each has, and which are left out as copies."""
        self.reading, self.survey, self._marks = reading, survey, marks
        self._starts = np.cumsum([0, *counts])
        self._held: np.ndarray | None = None
        self._data: DataSpec | None = None
        self.held = 0
        """How many are held out whole."""

    @property
    def dropped(self) -> tuple[int, int]:
        """How many examples are left out as copies, and of how many."""
        return (0 if self._marks is None else int(self._marks.sum())), int(self._starts[-1])

    def divide(self, data: DataSpec) -> None:
        """Decide which examples are held out; unless that is asked for, none is.

        Raises:
            UserError: nothing would be left to train on.
        """
        self._data = data
        if stream.way_of(self.survey, data) != "whole":
            return
        if self.survey.is_listed:
            held = stream.division_of(self.survey, data).held
            self._held = np.zeros(int(self._starts[-1]), dtype=bool)
            self._held[slice(None) if self._marks is None else ~self._marks] = held
            self.held = int(self._held.sum())
            return
        for groups in self.hashes("groups")():
            self.held += int(splitting.taken(groups, data.eval_fraction, data.split_seed).sum())
        splitting.check_taken(self.held, self.survey.tally.count, data.eval_fraction)

    def division(self, number: int) -> Division:
        """Return how the examples of a range are told apart."""
        dropped = self._dropped(number)
        if self._data is None:
            return Division("nothing", 0.0, None, dropped)
        way = stream.way_of(self.survey, self._data)
        return Division(way, self._data.eval_fraction, self._held_of(number) if way == "whole" else None, dropped)

    def hashes(self, column: str) -> Hashes:
        """Return what reads the hashes of one kind of all examples that are not left out, range by range."""

        def read() -> Iterator[np.ndarray]:
            for number in range(len(self.reading.ranges)):
                found, dropped = column_of(self.reading.survey_file(number), column), self._dropped(number)
                yield found if dropped is None else found[~dropped]

        return read

    def _held_of(self, number: int) -> np.ndarray:
        if self._held is not None:
            return self._held[self._starts[number] : self._starts[number + 1]]
        assert self._data is not None, "it is decided what is held out"
        groups = column_of(self.reading.survey_file(number), "groups")
        return splitting.taken(groups, self._data.eval_fraction, self._data.split_seed)

    def _dropped(self, number: int) -> np.ndarray | None:
        if self._marks is None:
            return None
        return np.array(self._marks[self._starts[number] : self._starts[number + 1]])


def column_of(path: Path, column: str) -> np.ndarray:
    """Return hashes of a range's examples, uint64 (n,); `contents` stand for `answers` where these say no more."""
    found = unfinished.hashes_in(path, column)
    return found if len(found) or column != "answers" else unfinished.hashes_in(path, "contents")


def gathered(reading: Reading, bad: BadRows, drop: bool, done: Iterator[bool], listed: int) -> Surveyed:
    """Add up what the surveys of all ranges say, in order, as they come.

    Args:
        bad: gets the rows that cannot be used.
        drop: copies are left out but for the first.
        done: yields once for each range, when its survey is there.
        listed: so many examples may be listed in memory.

    Raises:
        UserError: no example can be used, or there is one bad row too many.
    """
    whole, counts, read = Survey(), list[int](), 0
    for number, _ in enumerate(done):
        survey, rows = unfinished.load_survey(reading.survey_file(number))
        for row in rows:
            bad.add(row)
        counts.append(len(survey.contents))
        read += len(survey.contents) + len(survey.left_out)
        whole = survey if not number else _sum(whole, survey)
    if not read:
        raise reading.source.nothing(bad)
    count = sum(counts)
    if not count:
        raise reading.none_usable(bad)
    return _counted(Surveyed(reading, whole, counts, None), counts, drop, listed)


def _sum(one: Survey, other: Survey) -> Survey:
    """Add a later range's survey to those before; all hashes of it are for who reads them from the files."""
    return replace(
        one,
        left_out=frozenset(),
        size=one.size + other.size,
        smallest=min(filter(None, (one.smallest, other.smallest)), default=0),
        can_be_cut=one.can_be_cut and other.can_be_cut,
        empty=one.empty + other.empty,
        unused=Counter(one.unused) + Counter(other.unused),
        uncut=one.uncut + other.uncut,
    )


def _counted(found: Surveyed, counts: list[int], drop: bool, listed: int) -> Surveyed:
    """Complete what the ranges come to by hashes of all their examples, in memory where these are few."""
    marks = _marked(found, sum(counts), listed) if drop else None
    kept = Surveyed(found.reading, found.survey, counts, marks)
    count = sum(counts) - (int(marks.sum()) if marks is not None else 0)
    names = ("contents", "groups", "answers")
    if sum(counts) <= listed:
        hashes = {name: np.concatenate(list(kept.hashes(name)())) for name in names}
        whole = replace(
            found.survey, **hashes, counted=None, can_be_cut=found.survey.can_be_cut and count < splitting.FEW
        )
    else:
        different = [tally.different(kept.hashes(name), sum(counts), listed) for name in names]
        counted = Tally(count, *different)
        whole = replace(found.survey, contents=NONE, groups=NONE, answers=NONE, counted=counted, can_be_cut=False)
    return Surveyed(found.reading, whole, counts, marks)


def _marked(found: Surveyed, count: int, listed: int) -> np.ndarray:
    """Mark the copies of an earlier example, bool (N,), in a file."""
    path = found.reading.folder / f"{found.reading.name}-copies"
    marks: np.ndarray = np.memmap(path, dtype=bool, mode="w+", shape=(count,))
    tally.mark_copies(found.hashes("answers"), marks, listed)
    return marks


def shared(train: Surveyed, held_out: Surveyed) -> tuple[int, int]:
    """Count the held-out examples that have the content, and the group, of a training one."""
    if train.survey.is_listed and held_out.survey.is_listed:
        return stream.shared(train.survey, held_out.survey)
    together = train.survey.tally.count + held_out.survey.tally.count
    contents, groups = (tally.among(held_out.hashes(n), train.hashes(n), together) for n in ("contents", "groups"))
    return contents, groups
