"""Raw examples one by one: read, checked, told apart into train and eval, cut into chunks. No list of all exists.

A source is read two or three times: once to survey it (which examples are held out depends on all of them), once to
learn from the training ones where there is something to learn, once to encode. Of each example 8 bytes are kept.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np

from cluster.errors import UserError
from jobs.data import splitting
from jobs.data.examples import BadRow, BadRows, Example, Source, bounded, printable
from jobs.data.grouping import grouped
from jobs.spec import DataSpec
from jobs.tasks import Task, TaskError, is_ours
from jobs.tasks.messages import is_blank

CHUNK_BYTES = 4 << 20
"""Raw bytes encoded in one go; fixed, so that the rows do not depend on the number of CPUs."""

NAMED = 12
"""So many files or columns are named."""

Split = Literal["train", "eval"]


@dataclass(frozen=True)
class Survey:
    """What the first reading of a source says."""

    contents: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.uint64))
    """Of each example that can be used, in order, a hash of what is encoded of it: uint64 (N,)."""
    groups: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.uint64))
    """Of each of them a hash of what keeps it on one side of a split with others: uint64 (N,)."""
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
    contradicting: int = 0
    """How many examples are copies of an earlier one with another answer."""
    unused: Mapping[str, int] = field(default_factory=dict)
    """Columns that have no effect → in how many examples they hold something."""
    cut_each: str = ""
    """What is held out of every example, in words; "" where whole examples are."""
    uncut: int = 0
    """How many examples are too short for that."""


@dataclass
class Stream:
    """The examples of a source that a task can use."""

    source: Source
    task: Task
    """Needs no `fit`: it only checks."""
    limit: int | None = None
    """How many are read at most."""

    def survey(self, bad: BadRows) -> Survey:
        """Check each example; what cannot be read, or what the task cannot use, goes to `bad`.

        Raises:
            UserError: none can be used, or there is one bad row too many.
        """
        contents, groups, answers = array("Q"), array("Q"), array("Q")
        left_out, empty, unused = set[int](), list[str](), Counter[str]()
        size, smallest, can_be_cut, uncut = 0, 0, True, 0
        for number, example in enumerate(self._read(bad, empty)):
            admitted = bounded(partial(self._admit, example), example.where or f"{self.source.name}, example {number}")
            if isinstance(admitted, BadRow):
                left_out.add(number)
                bad.add(admitted)
                continue
            content, group = admitted
            contents.append(content)
            groups.append(group)
            if is_ours(self.task):
                unused.update(self.task.unused(example))
                answer = self.task.answer(example)
                answers.extend([] if answer is None else [splitting.content_of([str(content), answer])])
            bytes_ = size_of(example)
            size, smallest = size + bytes_, min(smallest or bytes_, bytes_)
            if self.task.cuts_each:
                uncut += self.task.cut(example, 0.0) is None
                continue
            can_be_cut = can_be_cut and len(contents) < splitting.FEW and self.task.cut(example, 1.0) is not None
        if not contents:
            raise UserError(f"data: {self.source.name}: none of its {bad.count} examples can be used; {bad.first[0]}")
        hashes, kin = (np.array(each, dtype=np.uint64) for each in (contents, groups))
        more = len(np.unique(np.array(answers, dtype=np.uint64))) - len(np.unique(hashes)) if answers else 0
        kept = (self.task.cuts_each, uncut)
        return Survey(hashes, kin, size, smallest, can_be_cut, frozenset(left_out), tuple(empty), more, unused, *kept)

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

    def ends(self, survey: Survey) -> Iterator[Example]:
        """Yield, of each example that can be used, the end that is to be predicted; of most tasks that is all of it."""
        for _, example in self.again(survey):
            if not self.task.cuts_each:
                yield example
            elif parts := self.task.cut(example, 0.0):
                yield Example(parts[1], example.where)

    def _read(self, bad: BadRows, empty: list[str] | None = None) -> Iterator[Example]:
        rows, grouping = self.source.examples(self.limit, bad, empty), self.task.grouping()
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


def told_apart(stream: Stream, survey: Survey, data: DataSpec) -> Iterator[tuple[Split, Example]]:
    """Yield each example with the split it belongs to (jobs/data/splitting.py).

    Raises:
        UserError: nothing would be left to train on.
    """
    how = way_of(survey, data)
    if how == "cut":
        yield from _cut(stream, survey, data.eval_fraction)
        return
    none = np.zeros(len(survey.contents), dtype=bool)
    held = splitting.held_out(survey.groups, data.eval_fraction, data.split_seed) if how == "whole" else none
    for index, example in stream.again(survey):
        yield ("eval" if held[index] else "train"), example


def way_of(survey: Survey, data: DataSpec) -> splitting.Way:
    """Decide how this data is split."""
    count = len(survey.contents)
    if survey.cut_each:
        return "cut" if data.eval_fraction else "nothing"
    distinct = count - splitting.copies(survey.groups)
    how = splitting.way(count, distinct, survey.smallest, survey.can_be_cut, data.eval_fraction)
    asked_for = "eval_fraction" in data.model_fields_set
    return "nothing" if how == "whole" and distinct == 1 and not asked_for else how


def said_of_split(survey: Survey, data: DataSpec) -> list[str]:
    """Say what was chosen: how a few examples were told apart, and that copies were kept together."""
    how, count, twice = way_of(survey, data), len(survey.contents), splitting.copies(survey.contents)
    said = []
    if survey.cut_each:
        return _said_of_ends(survey, data)
    if how == "nothing" and data.eval_fraction:
        one = "there is 1 example" if count - twice == 1 else "all examples belong together, as those of one prompt do"
        said.append(f"nothing is held out: {one}{', many times over' if count > 1 == count - twice else ''}")
    if how == "cut":
        what = "the text is" if count == 1 else f"the {count} texts are each"
        said.append(f"{what} cut: the last {100 * data.eval_fraction:.3g}% is held out")
    elif how == "whole" and (twice or count < splitting.FEW):
        held = int(splitting.held_out(survey.groups, data.eval_fraction, data.split_seed).sum())
        said.append(f"{held} of {count} examples are held out, whole")
    beside = ", and are kept on its side of the split" if how == "whole" else ""
    if twice and how != "cut" and count - twice > 1:
        said.append(f"{twice} of {count} examples are copies of an earlier one{beside}")
    if (kin := splitting.copies(survey.groups) - twice) and how == "whole":
        said.append(f"{kin} of {count} examples have the prompt of an earlier one{beside}")
    return said


def _said_of_ends(survey: Survey, data: DataSpec) -> list[str]:
    if not data.eval_fraction:
        return []
    if "eval_fraction" in data.model_fields_set:
        raise UserError(
            f"data.eval_fraction {data.eval_fraction:g}: this task holds out {survey.cut_each}, and no share; leave it "
            "out, or set it to 0 to hold nothing out"
        )
    short = f"; {survey.uncut} of {len(survey.contents)} are too short, and are learned whole" if survey.uncut else ""
    return [f"held out: {survey.cut_each}{short}"]


def said_of_content(survey: Survey) -> list[str]:
    """Say what of a source has no effect: files without an example, columns that are not read."""
    said = []
    if survey.empty:
        named = _some(list(survey.empty), len(survey.empty))
        said.append(f"{len(survey.empty)} of the files hold no example: {named}")
    if survey.contradicting:
        count = len(survey.contents)
        said.append(f"{survey.contradicting} of {count} examples are copies of an earlier one with another target")
    if survey.unused:
        columns = [f"{column!r} (in {count})" for column, count in sorted(survey.unused.items())]
        said.append(f"columns that have no effect: {_some(columns, len(columns))}")
    return said


def _some(names: list[str], count: int) -> str:
    return printable(", ".join(names[:NAMED]) + (f", … ({count})" if count > NAMED else ""))


def said_of_overlap(train: Survey, held_out: Survey) -> list[str]:
    """Say how many training examples are copies, and how many held-out ones are in the training data too."""
    both = int(np.isin(held_out.contents, train.contents).sum())
    count = len(held_out.contents)
    twice = splitting.copies(train.contents)
    kin = int(np.isin(held_out.groups, train.groups).sum()) - both
    said = [f"{twice} of {len(train.contents)} examples are copies of an earlier one"] if twice else []
    said += [f"{both} of {count} held-out examples are also in the training data"] if both else []
    return said + ([f"{kin} of {count} held-out examples have a prompt of the training data"] if kin else [])


def _cut(stream: Stream, survey: Survey, fraction: float) -> Iterator[tuple[Split, Example]]:
    for _, example in stream.again(survey):
        parts = stream.task.cut(example, 1 - fraction)
        if parts is None and survey.cut_each:
            yield "train", example
            continue
        assert parts is not None, "the survey said that it can be cut"
        for part in () if survey.cut_each else parts:
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
