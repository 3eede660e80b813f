"""Raw examples one by one: read, checked, told apart into train and eval, cut into chunks. No list of all exists.

A source, or a range of one (jobs/data/ranges.py), is read two or three times: once to survey it (which examples are
held out depends on all of them), once to learn from the training ones where there is something to learn, once to
encode. Of each example 16 or 24 bytes of hashes are kept.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np

from cluster.errors import UserError
from jobs.data import splitting
from jobs.data.examples import BadRow, BadRows, Example, Source, bounded
from jobs.data.grouping import grouped
from jobs.data.tally import Tally, tally_of
from jobs.spec import DataSpec
from jobs.tasks import Task, TaskError, is_ours
from jobs.tasks.messages import is_blank

CHUNK_BYTES = 4 << 20
"""Raw bytes encoded in one go; fixed, so that the rows do not depend on the number of CPUs."""

Split = Literal["train", "eval"]

NONE = np.zeros(0, dtype=np.uint64)
"""No hashes."""


@dataclass(frozen=True)
class Survey:
    """What the first reading of a source, or of a range of it, says."""

    contents: np.ndarray = field(default_factory=lambda: NONE)
    """Of each example that can be used, in order, a hash of what is encoded of it: uint64 (N,)."""
    groups: np.ndarray = field(default_factory=lambda: NONE)
    """Of each of them a hash of what keeps it on one side of a split with others: uint64 (N,)."""
    answers: np.ndarray = field(default_factory=lambda: NONE)
    """Of each of them a hash of its content and its answer, uint64 (N,); (0,) where no content lacks an answer."""
    counted: Tally | None = None
    """What they come to, where there are too many to be listed above."""
    size: int = 0
    """Raw bytes."""
    smallest: int = 0
    """Raw bytes of the smallest example."""
    can_be_cut: bool = False
    """True where there are few examples, and each is a text."""
    left_out: frozenset[int] = frozenset()
    """Which of those that could be read cannot be used, counted from 0."""
    empty: tuple[str, ...] = ()
    """Files that hold no example."""
    unused: Mapping[str, int] = field(default_factory=dict)
    """Columns that have no effect → in how many examples they hold something."""
    cut_each: str = ""
    """What is held out of every example, in words; "" where whole examples are."""
    uncut: int = 0
    """How many examples are too short for that."""

    @cached_property
    def tally(self) -> Tally:
        """How many there are, and how many of them are different."""
        return self.counted or tally_of(self.contents, self.groups, self.answers)

    @property
    def is_listed(self) -> bool:
        """True where there is a hash of each."""
        return self.counted is None or len(self.groups) == self.counted.count


@dataclass
class Stream:
    """The examples of a source that a task can use."""

    source: Source
    task: Task
    """Needs no `fit`: it only checks."""
    limit: int | None = None
    """How many are read at most."""
    on_read: Callable[[int], None] = lambda size: None
    """Called in a survey with the bytes of each example."""

    def survey(self, bad: BadRows) -> Survey:
        """Check each example; what cannot be read, or what the task cannot use, goes to `bad`.

        Raises:
            UserError: there is one bad row too many.
        """
        contents, groups, answers = array("Q"), array("Q"), array("Q")
        left_out, empty, unused = set[int](), list[str](), Counter[str]()
        size, smallest, can_be_cut, uncut, answered = 0, 0, True, 0, False
        ours, cuts_each = is_ours(self.task), self.task.cuts_each
        for number, example in enumerate(self._read(bad, empty)):
            admitted = bounded(partial(self._admit, example), example.where or f"{self.source.name}, example {number}")
            if isinstance(admitted, BadRow):
                left_out.add(number)
                bad.add(admitted)
                continue
            content, group = admitted
            contents.append(content)
            groups.append(group)
            answer = self.task.answer(example) if ours else None
            answers.append(content if answer is None else splitting.content_of([str(content), answer]))
            answered = answered or answer is not None
            unused.update(self.task.unused(example) if ours else ())
            bytes_ = size_of(example)
            size, smallest = size + bytes_, min(smallest or bytes_, bytes_)
            self.on_read(bytes_)
            if cuts_each:
                uncut += self.task.cut(example, 0.0) is None
                continue
            can_be_cut = can_be_cut and len(contents) < splitting.FEW and self.task.cut(example, 1.0) is not None
        return Survey(
            _hashes(contents),
            _hashes(groups),
            _hashes(answers) if answered else NONE,
            size=size,
            smallest=smallest,
            can_be_cut=can_be_cut,
            left_out=frozenset(left_out),
            empty=tuple(empty),
            unused=unused,
            cut_each=cuts_each,
            uncut=uncut,
        )

    def again(self, survey: Survey) -> Iterator[tuple[int, Example]]:
        """Yield the examples that can be used once more, with their numbers.

        Raises:
            UserError: there are more, or fewer, than at first.
        """
        index = 0
        for number, example in enumerate(self._read(BadRows(seen_before=True))):
            if number in survey.left_out:
                continue
            if index < len(survey.contents):
                yield index, example
            index += 1
        if index != len(survey.contents):
            raise UserError(f"data: {self.source.name} has changed while it was read; submit the job again")

    def ends(self, survey: Survey, dropped: np.ndarray | None = None) -> Iterator[Example]:
        """Yield, of each example that can be used, the end that is to be predicted; of most tasks that is all of it.

        Args:
            dropped: which are left out, bool (N,); None: none.
        """
        for index, example in self.again(survey):
            if dropped is not None and dropped[index]:
                continue
            if not self.task.cuts_each:
                yield example
            elif parts := self.task.cut(example, 0.0):
                yield Example(parts[1], example.where)

    def _read(self, bad: BadRows, empty: list[str] | None = None) -> Iterator[Example]:
        rows, grouping = self.source.found(self.limit, bad, empty), self.task.grouping()
        return rows if grouping is None else grouped(rows, grouping, self.task.check, bad)

    def _admit(self, example: Example) -> tuple[int, int]:
        """Check an example; return hashes of its content, and of what keeps it on one side with others."""
        if self.task.grouping() is None:
            self.task.check(example)
        content = self.task.content(example)
        if isinstance(content, str) and is_blank(content):
            raise TaskError("the text is empty")
        found, shared = splitting.content_of(content), self.task.together(example)
        return found, found if shared is None else splitting.content_of(shared)


@dataclass(frozen=True)
class Division:
    """How the examples of a source, or of a range of it, are told apart."""

    way: splitting.Way
    fraction: float
    """What is held out of each that is cut."""
    held: np.ndarray | None = None
    """Which are held out whole, bool (N,); None: none."""
    dropped: np.ndarray | None = None
    """Which are left out as copies, bool (N,); None: none."""


def division_of(survey: Survey, data: DataSpec) -> Division:
    """Decide how listed examples are told apart (jobs/data/splitting.py).

    Raises:
        UserError: nothing would be left to train on.
    """
    how = way_of(survey, data)
    held = splitting.held_out(survey.groups, data.eval_fraction, data.split_seed) if how == "whole" else None
    return Division(how, data.eval_fraction, held)


def divided(stream: Stream, survey: Survey, division: Division) -> Iterator[tuple[Split, Example]]:
    """Yield each example that is not left out with its split."""
    for index, example in stream.again(survey):
        if division.dropped is not None and division.dropped[index]:
            continue
        if division.way == "cut":
            yield from _cut(stream, example, division.fraction)
        else:
            yield ("eval" if division.held is not None and division.held[index] else "train"), example


def way_of(survey: Survey, data: DataSpec) -> splitting.Way:
    """Decide how this data is split."""
    if survey.cut_each:
        return "cut" if data.eval_fraction else "nothing"
    count, distinct = survey.tally.count, survey.tally.groups
    how = splitting.way(count, distinct, survey.smallest, survey.can_be_cut, data.eval_fraction)
    asked_for = "eval_fraction" in data.model_fields_set
    return "nothing" if how == "whole" and distinct == 1 and not asked_for else how


def shared(train: Survey, held_out: Survey) -> tuple[int, int]:
    """Count the listed held-out examples that have the content, and the group, of a listed training one."""
    both = ((held_out.contents, train.contents), (held_out.groups, train.groups))
    in_content, in_group = (int(np.isin(one, other).sum()) for one, other in both)
    return in_content, in_group


def _hashes(found: array[int]) -> np.ndarray:
    return np.array(found, dtype=np.uint64)


def _cut(stream: Stream, example: Example, fraction: float) -> Iterator[tuple[Split, Example]]:
    parts, cuts_each = stream.task.cut(example, 1 - fraction), stream.task.cuts_each
    if parts is None and cuts_each:
        yield "train", example
        return
    assert parts is not None, "the survey said that it can be cut"
    for part in () if cuts_each else parts:
        if any(not str(value).strip() for key, value in part.items() if value is not example[key]):
            raise UserError(
                f"{example.where or stream.source.name}: the text is too short to hold {fraction} of it out; "
                "set data.eval_fraction: 0, or give data.eval"
            )
    yield "train", Example(parts[0], example.where)
    yield "eval", Example(parts[1], example.where)


def chunks(examples: Iterable[Example]) -> Iterator[list[Example]]:
    """Gather examples into chunks of about CHUNK_BYTES, in order."""
    for _, chunk in split_chunks(("train", example) for example in examples):
        yield chunk


def split_chunks(examples: Iterable[tuple[Split, Example]]) -> Iterator[tuple[Split, list[Example]]]:
    """Gather the examples of each split into chunks of about CHUNK_BYTES, in order."""
    waiting: dict[Split, list[Example]] = {"train": [], "eval": []}
    sizes: dict[Split, int] = {"train": 0, "eval": 0}
    for split, example in examples:
        waiting[split].append(example)
        sizes[split] += size_of(example)
        if sizes[split] >= CHUNK_BYTES:
            yield split, waiting[split]
            waiting[split], sizes[split] = [], 0
    yield from ((split, chunk) for split, chunk in waiting.items() if chunk)


def size_of(example: Example) -> int:
    """Return about how many bytes an example takes."""
    return sum(_bytes_of(value) for value in example.values())


def _bytes_of(value: Any) -> int:
    if isinstance(value, str | bytes):
        return len(value)
    return 200 + 32 * len(value) if isinstance(value, list) else int(getattr(value, "nbytes", 200))
