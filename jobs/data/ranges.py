"""A source in ranges: what one task reads by itself. Pure: neither CPUs nor processes decide them.

Neighbouring files make a range up to RANGE_BYTES; a larger file of lines, or of row groups, is cut into parts of about
that size. What cannot be cut (compressed files, CSV with its quotes, single texts) is one range, however large it is.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass, replace
from functools import partial

from jobs.data.examples import Rows, Source
from jobs.data.tally import LISTED
from jobs.tasks import Task

RANGE_BYTES = 64 << 20
"""A range has at least so many bytes, unless it is the last one; fixed, as the borders of ranges decide rows."""
SPREAD_BYTES = 64 << 20
"""From this size on, others read and encode too; below, starting them would take longer."""
VERSION = 1
"""Raise it when the borders of ranges change: rows encoded before are not used where there are several."""


@dataclass(frozen=True)
class Sizes:
    """How much is read or listed at a time; only tests set others."""

    range_bytes: int = RANGE_BYTES
    spread_bytes: int = SPREAD_BYTES
    listed: int = LISTED
    """Examples that are listed in memory."""


SIZES = Sizes()


def ranges_of(source: Source, task: Task, limit: int | None, sizes: Sizes = SIZES) -> list[Source]:
    """Return the ranges of a source, in order; itself where it is one, or is no files.

    Where a task gathers rows, or at most `limit` examples are read, what is read of a range depends on the others. Of a
    mixture no range holds more than one source, whose name it bears.
    """
    if source.mixed:
        apart = [(each, ranges_of(each, task, limit, sizes)) for each in source.mixed]
        return [part for each, found in apart for part in (found if len(found) > 1 else [_alone(each)])]
    if limit is not None or task.grouping() is not None or any(single.size is None for single in source.singles):
        return [source]
    ranges, gathered, size = list[Source](), list[Source](), 0
    for part in (part for single in source.singles for part in _parts(single)):
        gathered.append(part)
        size += part.size or 0
        if size >= sizes.range_bytes:
            ranges.append(_range(source, gathered, size))
            gathered, size = [], 0
    if gathered:
        ranges.append(_range(source, gathered, size))
    return ranges if len(ranges) > 1 else [source]


def disk_size(source: Source) -> int:
    """Return the bytes of a source's files; 0 where it is none."""
    return sum(single.size or 0 for single in source.singles)


def can_be_sent(source: Source, *beside: object) -> bool:
    """Tell whether another process can read a range: it is files, and with what goes beside it can be pickled."""
    if any(single.size is None for single in source.singles):
        return False
    try:
        pickle.dumps((source, beside))
    except (pickle.PicklingError, AttributeError, TypeError):
        return False
    return True


def _parts(single: Source) -> list[Source]:
    """Return the parts of a file, each as a source; the file itself where it has none."""
    if not single.cuts or single.read_cut is None:
        return [single]
    read = single.read_cut
    return [
        replace(single, read=partial(read, cut), size=cut.size, cuts=(), read_cut=None, is_cut=True)
        for cut in single.cuts
    ]


def _alone(source: Source) -> Source:
    """Return a source that is one range, so that another process can read it where its files can be."""
    return _range(source, list(source.singles), disk_size(source))


def _range(source: Source, parts: list[Source], size: int) -> Source:
    """Return some parts as one source, which bears the name of the whole."""
    return Source(source.name, "", _unread, names_files=source.names_files, parts=tuple(parts), size=size)


def _unread() -> Rows:
    raise AssertionError("a range is read by its parts")
