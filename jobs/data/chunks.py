"""What is done to a chunk of examples, observing or encoding it, and where: here, or by tasks all over the cluster."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

from cluster.results import result_of
from jobs.data import rows
from jobs.data.examples import BadRow, BadRows, Example, bounded
from jobs.spec import TaskSpec
from jobs.tasks import TASKS, Task, TaskError, TaskSetupError, get

Given = TypeVar("Given")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Encoded:
    """What became of one chunk."""

    file: str
    examples: int
    rows: int
    targets: int = 0
    """Terms of the loss in its rows."""
    digest: str = ""
    """SHA-256 (hex) of the file of its rows."""
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
    found, bad = _each_or_all(learner.observe, chunk)
    if bad and not skip_bad:
        BadRows(own_code=task.name not in TASKS).add(bad[0])
    return found


def encode(task: TaskSpec, directory: Path, numbered: tuple[str, list[Example]]) -> Encoded:
    """Encode a chunk by what the task in `directory`/task learned, and write its rows there.

    Args:
        numbered: the file's name, and the chunk.

    Raises:
        TaskError: the task returns no rows.
    """
    name, chunk = numbered
    encoder = _load(task.name, directory / "task", json.dumps(task.options))
    columns, left_out = _each_or_all(encoder.encode, chunk)
    if columns is None:
        return Encoded(name, len(chunk), 0, left_out=left_out)
    counts = {key: int(columns.pop(key).sum()) for key in encoder.counted if key in columns}
    if "targets" not in columns:
        raise TaskError(f"task {task.name!r}: encode() must return a column `targets`; it returned {sorted(columns)}")
    if not len(columns["targets"]):
        return Encoded(name, len(chunk), 0, counts=counts, left_out=left_out)
    written = rows.write(directory / name, columns)
    digest = hashlib.sha256((directory / name).read_bytes()).hexdigest()
    return Encoded(name, len(chunk), written, int(columns["targets"].sum()), digest, counts, left_out)


def _each_or_all(work: Callable[[list[Example]], Made], chunk: list[Example]) -> tuple[Made | None, list[BadRow]]:
    """Do `work` on a chunk, without those of its examples on which alone it cannot be done; return these too.

    None where nothing is left.

    Raises:
        Exception: the work's own, where each example alone can be worked on: then it is not one of them.
    """
    try:
        return work(chunk), []
    except TaskSetupError:
        raise
    except Exception:
        alone = [(example, bounded(partial(work, [example]), example.where)) for example in chunk]
        bad = [result for _, result in alone if isinstance(result, BadRow)]
        if not bad:
            raise
    good = [example for example, result in alone if not isinstance(result, BadRow)]
    return (work(good) if good else None), bad


@lru_cache(maxsize=1)
def _load(task: str, directory: Path, options: str) -> Task:
    """Load the task once for all the chunks of a process; `options` is JSON, which can be hashed."""
    return get(task).load(directory, json.loads(options))
