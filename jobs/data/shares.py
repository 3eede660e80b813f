"""What one task does with a range of a source: survey it, learn from it, encode it. Any node that sees its files can.

The files of the preparation (jobs/data/unfinished.py) are on a storage that all nodes see, or in an object store
(jobs/data/stored_work.py); those of the source need not be: a task that does not find them says so, and the driver
reads that range.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jobs.data import chunks, stream, unfinished
from jobs.data.chunks import Encoded
from jobs.data.examples import BadRow, BadRows, Example, Source
from jobs.data.meter import ActorPulse, FilePulse, Pulse
from jobs.data.stored_work import Looks, StoredWork, are_as
from jobs.data.stream import Division, Split, Stream
from jobs.spec import TaskSpec
from jobs.tasks import Task


@dataclass(frozen=True)
class Share:
    """A range of a source, and what is to be done with it."""

    name: str
    """Of the range: "train-000012"."""
    source: Source
    checker: Task
    """Needs no `fit`."""
    limit: int | None
    """How many examples are read at most."""
    survey: Path
    """The file of its survey (jobs/data/unfinished.py)."""
    most: int
    """How many bad rows are put up with."""
    pulse: Pulse
    division: Division | None = None
    """How its examples are told apart; None in a survey."""
    ends: bool = False
    """True where all of it is held out."""
    is_here: bool = False
    """True where it is read by the driver: what it does not find is not there."""
    suffix: str = ""
    """What stands in the names of its files behind the split; "" where there is one range."""
    looks: Looks | None = None
    """How its files look to the driver, where nodes share no folder; None: one of that name is the same everywhere."""


class _Enough(Exception):
    """There is one bad row too many: who adds up says so."""


class _Gathered(BadRows):
    """Keeps bad rows for the driver, which counts them in the order of the data."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._limit = most
        self.rows: list[BadRow] = []

    def add(self, row: BadRow) -> None:
        """Keep one.

        Raises:
            _Enough: it is one too many, wherever the range stands.
        """
        self.rows.append(row)
        if len(self.rows) > self._limit:
            raise _Enough


def survey(share: Share) -> bool:
    """Survey a range into its file, unless that is there; return False where the range cannot be read here."""
    if share.survey.is_file():
        return True
    if not sees(share):
        return False
    bad = _Gathered(share.most)
    stream_ = Stream(share.source, share.checker, share.limit, lambda size: share.pulse(1, size))
    try:
        found = stream_.survey(bad)
    except _Enough:
        found = stream.Survey()
    unfinished.save_survey(share.survey, found, bad.rows)
    _tell(share)
    return True


def observe(task: TaskSpec, skip_bad: bool, expected_bytes: int, share: Share) -> tuple[bool, Any]:
    """Return whether a range can be read here, and what the task finds in its training examples."""
    if not sees(share):
        return False, None
    training = (example for split, example in examples(share) if split == "train")
    found = merged(
        _counting(share, partial(chunks.observe, task, skip_bad, expected_bytes), stream.chunks(training), len)
    )
    _tell(share)
    return True, found


def encode(
    task: TaskSpec, directory: Path, splits: frozenset[Split], share: Share, stored: StoredWork | None = None
) -> list[Encoded] | None:
    """Encode a range into files of rows; None where it cannot be read here. `stored`: see `chunks.encode`."""
    if not sees(share):
        return None
    work = partial(chunks.encode, task, directory, stored=stored)
    made = list(_counting(share, work, numbered(share, splits), lambda item: len(item[1])))
    _tell(share)
    return made


def examples(share: Share) -> Iterator[tuple[Split, Example]]:
    """Yield the examples of a surveyed range, each with the split it belongs to."""
    assert share.division is not None, "the examples of a range that is only surveyed"
    found, _ = unfinished.load_survey(share.survey)
    stream_ = Stream(share.source, share.checker, share.limit)
    if share.ends:
        return (("eval", example) for example in stream_.ends(found, share.division.dropped))
    return stream.divided(stream_, found, share.division)


def numbered(share: Share, splits: frozenset[Split]) -> Iterator[tuple[str, list[Example]]]:
    """Name the file that each chunk of a range goes to."""
    counts: Counter[str] = Counter()
    wanted = (item for item in examples(share) if item[0] in splits)
    for split, chunk in stream.split_chunks(wanted):
        yield f"{split}{share.suffix}-{counts[split]:05d}.arrow", chunk
        counts[split] += 1


def range_of(file: str) -> int:
    """Return the number of the range that a file of rows is of, where there are several."""
    return int(file.split("-")[1])


def sees(share: Share) -> bool:
    """Tell whether this machine sees the files of a range."""
    if share.looks is not None and not share.is_here:
        return are_as(share.looks)
    places = (single.origin for single in share.source.singles)
    return share.is_here or all("://" in place or Path(place).exists() for place in places)


def merged(findings: Iterable[Any]) -> Any:
    """Add findings up, in the order of their chunks; None where nothing was found."""
    whole = None
    for found in findings:
        whole = found if whole is None else whole if found is None else whole.merged(found)
    return whole


def _counting(share: Share, work: Callable[[Any], Any], items: Iterable[Any], rows: Callable[[Any], int]) -> Any:
    for item in items:
        yield work(item)
        chunk = item[1] if isinstance(item, tuple) else item
        share.pulse(rows(item), sum(map(stream.size_of, chunk)))


def _tell(share: Share) -> None:
    if isinstance(share.pulse, FilePulse | ActorPulse):
        share.pulse.write()
