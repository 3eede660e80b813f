"""What is done to a chunk of examples, observing or encoding it, and where: here, or by tasks all over the cluster."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from cluster.errors import UserError
from cluster.results import result_of
from jobs.data import rows
from jobs.data.examples import BadRow, Example
from jobs.spec import TaskSpec
from jobs.tasks import Columns, Task, TaskError, get

Given = TypeVar("Given")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Encoded:
    """What became of one chunk."""

    file: str
    examples: int
    rows: int
    counts: dict[str, int] = field(default_factory=dict)
    """What the task counted while it encoded."""
    left_out: list[BadRow] = field(default_factory=list)


def everywhere(work: Callable[[Given], Made], chunks: Iterable[Given], on_cluster: bool) -> Iterator[Made]:
    """Do `work` on each chunk and yield the results in the chunks' order; few chunks are in memory at a time.

    On the cluster a few more are under way than there are CPUs. What a chunk gives does not depend on where.
    """
    if not on_cluster:
        yield from map(work, chunks)
        return
    import ray

    def one(chunk: Given) -> Made:  # Ray takes functions, and `work` may be a partial one
        return work(chunk)

    remote = ray.remote(num_cpus=1, max_retries=3)(one)
    limit = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    running: deque[Any] = deque()
    for chunk in chunks:
        running.append(remote.remote(chunk))
        if len(running) == limit:
            yield result_of(running.popleft())
    while running:
        yield result_of(running.popleft())


def observe(task: TaskSpec, skip_bad: bool, chunk: list[Example]) -> Any:
    """Return what the task finds in a chunk; None where nothing of it can be used.

    Raises:
        UserError: an example cannot be used, and `skip_bad` is off; else `encode` leaves it out and counts it.
    """
    learner = get(task.name)(task.options)
    try:
        return learner.observe(chunk)
    except TaskError:
        good, bad = _sieve(learner.observe, chunk)
        if bad and not skip_bad:
            raise UserError(str(bad[0])) from None
        if not bad:  # each can be observed alone: what is wrong is not one of them
            raise
        return learner.observe(good) if good else None


def encode(task: TaskSpec, directory: Path, numbered: tuple[str, list[Example]]) -> Encoded:
    """Encode a chunk by what the task in `directory`/task learned, and write its rows there.

    Args:
        numbered: the file's name, and the chunk.

    Raises:
        UserError: none of its examples can be encoded, or the task returns no rows.
    """
    name, chunk = numbered
    encoder = _load(task.name, directory / "task", json.dumps(task.options))
    left_out: list[BadRow] = []
    try:
        columns: Columns = encoder.encode(chunk)
    except TaskError as error:
        good, left_out = _sieve(encoder.encode, chunk)
        if not left_out:
            raise
        if not good:
            raise UserError(str(left_out[0])) from error
        columns = encoder.encode(good)
    counts = {key: int(columns.pop(key).sum()) for key in encoder.counted if key in columns}
    if "targets" not in columns:
        raise TaskError(f"task {task.name!r}: encode() must return a column `targets`; it returned {sorted(columns)}")
    written = rows.write(directory / name, columns) if len(columns["targets"]) else 0
    return Encoded(name, len(chunk), written, counts, left_out)


@lru_cache(maxsize=1)
def _load(task: str, directory: Path, options: str) -> Task:
    """Load the task once for all the chunks of a process; `options` is JSON, which can be hashed."""
    return get(task).load(directory, json.loads(options))


def _sieve(work: Callable[[list[Example]], Any], chunk: list[Example]) -> tuple[list[Example], list[BadRow]]:
    """Tell the examples that can be worked on from those that cannot."""
    good, left_out = [], []
    for example in chunk:
        try:
            work([example])
            good.append(example)
        except TaskError as error:
            left_out.append(BadRow(example.where, str(error)))
    return good, left_out
