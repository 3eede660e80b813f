"""Raw examples one by one: read, checked, told apart into train and eval, cut into chunks. No list of all exists.

A source is read two or three times: once to count (which examples are held out depends on their number), once to learn
from the training ones where there is something to learn, once to encode.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from cluster.errors import UserError
from jobs.data import sources
from jobs.data.examples import BadRow, BadRows, Example, Source
from jobs.spec import DataSpec
from jobs.tasks import Task, TaskError

CHUNK_BYTES = 4 << 20
"""Raw bytes encoded in one go; fixed, so that the rows do not depend on the number of CPUs."""

Split = Literal["train", "eval"]


@dataclass(frozen=True)
class Survey:
    """What the first reading of a source says."""

    examples: int
    size: int
    """Raw bytes."""
    can_be_cut: bool
    """True where there are so few examples that each is cut to hold its end out, and the task can."""


@dataclass
class Stream:
    """The examples of a source that a task can use."""

    source: Source
    task: Task
    """Needs no `fit`: it only checks."""
    limit: int | None = None
    """How many are read at most."""

    def read(self, bad: BadRows) -> Iterator[Example]:
        """Yield the examples; what cannot be read, or what the task cannot use, goes to `bad`."""
        for example in self.source.examples(self.limit, bad):
            try:
                self.task.check(example)
            except TaskError as error:
                bad.add(BadRow(example.where or self.source.name, str(error)))
                continue
            yield example

    def again(self) -> Iterator[Example]:
        """Yield the examples once more; the bad rows have been counted."""
        return self.read(BadRows(seen_before=True))

    def survey(self, bad: BadRows) -> Survey:
        """Count the examples.

        Raises:
            UserError: none can be used, or there is one bad row too many.
        """
        examples = size = 0
        can_be_cut = True
        for example in self.read(bad):
            examples += 1
            size += size_of(example)
            can_be_cut = can_be_cut and examples < sources.SMALL and self.task.cut(example, 1.0) is not None
        if not examples:
            raise UserError(f"data: {self.source.name}: none of its {bad.count} examples can be used; {bad.first[0]}")
        return Survey(examples, size, can_be_cut)


def told_apart(stream: Stream, survey: Survey, data: DataSpec) -> Iterator[tuple[Split, Example]]:
    """Yield each example with the split it belongs to; few long texts are cut, and their ends held out.

    Raises:
        UserError: nothing would be left to train on.
    """
    if data.eval_fraction and survey.can_be_cut:
        yield from _cut(stream, data.eval_fraction)
        return
    chosen = sources.held_out(survey.examples, data.eval_fraction, data.split_seed)
    for index, example in enumerate(stream.again()):
        yield ("eval" if index in chosen else "train"), example


def _cut(stream: Stream, fraction: float) -> Iterator[tuple[Split, Example]]:
    for example in stream.again():
        parts = stream.task.cut(example, 1 - fraction)
        assert parts is not None, "the survey said that it can be cut"
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
    return sum(len(v) if isinstance(v, str | bytes) else getattr(v, "nbytes", 200) for v in example.values())
