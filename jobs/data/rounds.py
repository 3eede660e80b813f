"""The rounds of a preparation over the ranges of its sources: survey, observe, encode. It is decided here who does one.

    few bytes                               this process, one range after the other
    ranges that any process can read        a task for each: the cluster's, or a process of this machine
    a range that only this process can      it is read here, and its chunks are worked on by tasks
    read, or that cannot be cut

Where nodes share no folder, what tasks read and make goes through the store (jobs/data/stored_work.py). What comes of a
range, the borders of its chunks too, is the same in all cases.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from jobs import progress
from jobs.data import chunks, ranges, shares, spread, stream, surveying, unfinished
from jobs.data.chunks import Encoded
from jobs.data.examples import BadRows, Example
from jobs.data.meter import InActor, InFolder, Meter, OnProgress, Pulses
from jobs.data.ranges import Sizes
from jobs.data.shares import Share
from jobs.data.stored_work import StoredWork, looks_of
from jobs.data.stream import Split
from jobs.data.surveying import Reading, Surveyed
from jobs.spec import TaskSpec

Chunk = tuple[str, list[Example]]
"""Examples, and the name of the file they go to."""


def layout_of(readings: list[Reading], sizes: Sizes) -> str:
    """Return what decides the files of a preparation besides its digest."""
    of_ranges = [[reading.name, [part.size for part in reading.ranges]] for reading in readings]
    return json.dumps([ranges.VERSION, sizes.range_bytes, stream.CHUNK_BYTES, of_ranges])


class Rounds:
    """Goes over the ranges, round by round."""

    def __init__(
        self,
        directory: Path,
        on_progress: OnProgress,
        sizes: Sizes,
        most_bad: int,
        helpers: spread.Helpers,
        stored: StoredWork | None = None,
        overlapped: bool = False,
    ) -> None:
        """Take the preparation's folder, who is told of progress, from how many bytes on others work too, and these.

        Args:
            stored: what tasks of the cluster read and make where nodes share no folder.
            overlapped: others read each file of rows as soon as it is made, wherever that was.
        """
        self._directory, self._on_progress, self._most_bad = directory, on_progress, most_bad
        self._sizes, self._helpers = sizes, helpers
        self._overlapped = overlapped
        self._stored = stored if spread.elsewhere() == "cluster" else None
        self._near: Pulses = InFolder(directory / unfinished.PULSES)
        self._far: Pulses | None = None
        self._layout = ""
        self._unseen = False
        """True once a task did not find the files: from then on they are read here."""

    def survey(self, readings: list[Reading], bad: BadRows, drop: bool) -> Iterator[Surveyed]:
        """Survey sources one after the other. Raises as surveying.gathered does."""
        size = sum(ranges.disk_size(reading.source) for reading in readings)
        self._layout = layout_of(readings, self._sizes)
        stored = self._laid_out(self._place(size))
        meter = self._meter("read", size)
        for reading in readings:
            todo = [self._share(reading, number) for number in range(len(reading.ranges))]
            alone = len(todo) == 1 or not all(map(_can_be_sent, todo))
            place = "here" if alone else self._place(ranges.disk_size(reading.source))
            if stored and place == "cluster" and not stored.is_seen_by_all(reading.source):
                self._say_unseen(reading.source.name)
                place = "processes"
            done = self._everywhere(partial(_survey, stored, self._directory), iter(todo), place, meter, bool)
            yield surveying.gathered(reading, bad, drop, _brought(stored, todo, done), self._sizes.listed)
        meter.end()

    def _laid_out(self, place: spread.Place) -> StoredWork | None:
        """Return the way through the store, once others are to work and if they need it."""
        if self._stored is None or (place == "here" and not self._overlapped):
            return None
        if not self._stored.layout:
            self._stored = self._stored.laid_out(self._layout, self._directory)
            self._far = InActor()
        return self._stored

    @property
    def stored(self) -> StoredWork | None:
        """The way through the store, as far as it is known."""
        return self._stored

    def bring_rows(self, made: list[Encoded]) -> None:
        """Have all rows here that were made: a node stores those of its own."""
        if self._stored and self._stored.learned:
            self._stored.bring_rows(self._directory, {each.file: each.digest for each in made if each.digest})

    def observe(self, task: TaskSpec, skip_bad: bool, of: Surveyed, expected_bytes: int) -> Any:
        """Return what a task finds in the training examples; `expected_bytes`: see Task."""
        place = self._place(of.survey.size)
        stored, meter = self._laid_out(place), self._meter("fit", of.survey.size)
        work = partial(_observe, stored, self._directory, task, skip_bad, expected_bytes)
        found = self._everywhere(work, self._todo(of, place, frozenset({"train"})), place, meter, lambda made: made[0])
        whole = shares.merged(observed for _, observed in found)
        meter.end()
        return whole

    def encode(
        self,
        task: TaskSpec,
        splits: frozenset[Split],
        of: list[Surveyed],
        order: Callable[[int], str] | None = None,
        beside: Callable[[], None] | None = None,
    ) -> Iterator[Encoded]:
        """Encode the splits that are wanted, file by file, in order.

        Args:
            order: by what the ranges of a source are sorted, of the number of each; None: as they stand in it.
            beside: others need the cluster meanwhile, and may wait for this; called now and then, to end it by raising.
        """
        size = sum(found.survey.size for found in of)
        place, there = self._place(size), 0
        place = "beside" if beside and place == "cluster" else place
        stored = self._laid_out(place)
        if stored and not stored.learned:
            stored = self._stored = stored.taught(self._directory)
        meter = self._meter("encode", size)
        todo = (item for found in of for item in self._todo(found, place, splits, order))
        work = partial(_encode, stored, task, self._directory, splits)
        for made in self._everywhere(work, todo, place, meter, lambda made: made is not None, beside):
            there += sum(encoded.was_there for encoded in made or ())
            yield from made or ()
        meter.end()
        if there:
            progress.say(f"{there} files of rows were there from a preparation that did not come to its end")

    def _goes_out(self, share: Share) -> bool:
        """Tell whether a range is encoded as a whole by another process: it is one of several, and not too large."""
        size = share.source.size or 0
        return bool(share.suffix) and size <= 2 * self._sizes.range_bytes and _can_be_sent(share)

    def _place(self, size: int) -> spread.Place:
        return "here" if size < self._sizes.spread_bytes else spread.elsewhere()

    def _meter(self, phase: str, size: int) -> Meter:
        return Meter(phase, size, self._on_progress, self._near, self._far)

    def _share(self, reading: Reading, number: int, of: Surveyed | None = None) -> Share:
        several = len(reading.ranges) > 1
        return Share(
            f"{reading.name}-{number:06d}",
            reading.ranges[number],
            reading.checker,
            reading.limit,
            reading.survey_file(number),
            self._most_bad,
            _unheard,
            of.division(number) if of else None,
            ends=reading.name == "held-out",
            suffix=f"-{number:06d}" if several else "",
        )

    def _todo(
        self,
        of: Surveyed,
        place: spread.Place,
        splits: frozenset[Split],
        order: Callable[[int], str] | None = None,
    ) -> Iterator[Share | Chunk]:
        """Yield the ranges of a source, or the chunks of those that have to be read here."""
        numbers = range(len(of.reading.ranges))
        for number in sorted(numbers, key=order) if order else numbers:
            share = self._share(of.reading, number, of)
            if place == "here" or (not self._unseen and self._goes_out(share)):
                yield share
            else:
                yield from shares.numbered(share, splits)

    def _everywhere(
        self,
        work: Callable[[Share | Chunk], Any],
        todo: Iterator[Share | Chunk],
        place: spread.Place,
        meter: Meter,
        was_read: Callable[[Any], bool],
        beside: Callable[[], None] | None = None,
    ) -> Iterator[Any]:
        """Do `work` on each range or chunk, in order; a range whose files were not found elsewhere is done here."""
        sent = deque[Share | Chunk]()

        def look() -> None:
            meter.look()
            if beside is not None:
                beside()

        def items() -> Iterator[Share | Chunk]:
            for unit in todo:
                sent.append(self._looked_at(_told(unit, place, meter)))
                yield sent[-1]

        for made in self._helpers.do(work, items(), place, look):
            unit = sent.popleft()
            if not was_read(made):
                if isinstance(unit, Share):
                    self._say_unseen(unit.source.name)
                made = work(_told(unit, "here", meter))
            if isinstance(unit, Share):
                meter.settle(unit.name)
            else:
                meter.add(len(unit[1]), sum(map(stream.size_of, unit[1])))
            yield made

    def _looked_at(self, unit: Share | Chunk) -> Share | Chunk:
        """Note how the files of a range look, for nodes that may have others of these names."""
        if isinstance(unit, Share) and self._stored:
            with suppress(OSError):  # whoever reads it says what is wrong
                return replace(unit, looks=looks_of(unit.source))
        return unit

    def _say_unseen(self, name: str) -> None:
        if not self._unseen:
            where = "'s node" if self._stored else ""
            progress.say(f"not every machine of the cluster sees {name}: the driver{where} reads it for them")
        self._unseen = True


def _unheard(rows: int, size: int) -> None:
    raise AssertionError("nobody is told yet how far a range is")


def _told(unit: Share | Chunk, place: spread.Place, meter: Meter) -> Share | Chunk:
    """Let a range tell the meter how far it is, from here or through a file."""
    if not isinstance(unit, Share):
        return unit
    if place == "here":
        return replace(unit, pulse=meter.add, is_here=True)
    return replace(unit, pulse=meter.pulse(unit.name, near=place == "processes"))


def _can_be_sent(share: Share) -> bool:
    """Tell whether another process can read a range."""
    return ranges.can_be_sent(share.source, share.checker)


def _brought(stored: StoredWork | None, todo: list[Share], done: Iterator[bool]) -> Iterator[bool]:
    """Have each survey here as soon as it is done."""
    for share, made in zip(todo, done, strict=True):
        if stored:
            stored.has_survey(share.survey)
        yield made


def _survey(stored: StoredWork | None, directory: Path, unit: Share | Chunk) -> bool:
    assert isinstance(unit, Share), "what is surveyed is a range"
    if stored is None:
        return shares.survey(unit)
    path = stored.survey_file(unit.survey, directory)
    if stored.is_home() or not stored.fetch_survey(path):
        if not shares.survey(replace(unit, survey=path)):
            return False
        stored.keep_survey(path)
    return True


def _observe(
    stored: StoredWork | None,
    directory: Path,
    task: TaskSpec,
    skip_bad: bool,
    expected_bytes: int,
    unit: Share | Chunk,
) -> tuple[bool, Any]:
    if not isinstance(unit, Share):
        return True, chunks.observe(task, skip_bad, expected_bytes, unit[1])
    share = _with_survey(stored, directory, unit)
    return (False, None) if share is None else shares.observe(task, skip_bad, expected_bytes, share)


def _encode(
    stored: StoredWork | None, task: TaskSpec, directory: Path, splits: frozenset[Split], unit: Share | Chunk
) -> list[Encoded] | None:
    """Return None where this node does not see the files, or misses what another preparation has removed at its end."""
    try:
        place = stored.own(directory) if stored else directory
        if not isinstance(unit, Share):
            return [chunks.encode(task, place, unit, stored)]
        share = _with_survey(stored, directory, unit)
        return None if share is None else shares.encode(task, place, splits, share, stored)
    except FileNotFoundError:  # of the same data: its nodes, too, remove what they worked on
        if stored is None or stored.is_home():
            raise
        return None


def _with_survey(stored: StoredWork | None, directory: Path, share: Share) -> Share | None:
    """Return a range whose survey is where this node has it; None where it is not stored any more."""
    if stored is None or stored.is_home():
        return share
    path = stored.survey_file(share.survey, directory)
    return replace(share, survey=path) if stored.fetch_survey(path) else None
