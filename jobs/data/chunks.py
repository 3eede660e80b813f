"""What is done to a chunk of examples: observing or encoding it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

from jobs.data import rows, unfinished
from jobs.data.examples import BadRow, BadRows, Example, bounded
from jobs.data.file_digests import file_digest
from jobs.data.stored_work import StoredWork
from jobs.spec import TaskSpec
from jobs.tasks import TASKS, Task, TaskError, TaskSetupError, get

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
    was_there: bool = False
    """True where an earlier preparation, which did not come to its end, had made it."""


def observe(task: TaskSpec, skip_bad: bool, expected_bytes: int, chunk: list[Example]) -> Any:
    """Return what the task finds in a chunk; None where nothing of it can be used.

    Args:
        expected_bytes: see Task.

    Raises:
        UserError: an example cannot be used, and `skip_bad` is off; else `encode` leaves it out and counts it.
    """
    learner = get(task.name)(task.options)
    learner.expected_bytes = expected_bytes
    found, bad = _each_or_all(learner.observe, chunk)
    if bad and not skip_bad:
        BadRows(own_code=task.name not in TASKS).add(bad[0])
    return found


def encode(
    task: TaskSpec, directory: Path, numbered: tuple[str, list[Example]], stored: StoredWork | None = None
) -> Encoded:
    """Encode a chunk by what the task in `directory`/task learned, and write its rows there; or find them there.

    Args:
        numbered: the file's name, and the chunk.
        stored: gets the rows, where nodes share no folder, and is asked for them; None: `directory` has them.

    Raises:
        TaskError: the task returns no rows.
    """
    name, chunk = numbered
    found = stored.finished(directory, name) if stored else unfinished.finished(directory, name)
    if found is not None and found["examples"] == len(chunk):
        left_out = [BadRow(**row) for row in found.pop("left_out")]
        return Encoded(**{**found, "left_out": left_out, "was_there": True})
    made = _encoded(task, directory, name, chunk)
    if stored:
        stored.keep(directory, name, asdict(made))
    else:
        unfinished.keep_record(directory, name, asdict(made))
    return made


def _encoded(task: TaskSpec, directory: Path, name: str, chunk: list[Example]) -> Encoded:
    encoder = _load(task.name, directory / "task", json.dumps(task.options), unfinished.learned_at(directory))
    columns, left_out = _each_or_all(encoder.encode, chunk)
    if columns is None:
        return Encoded(name, len(chunk), 0, left_out=left_out)
    counts = {key: int(columns.pop(key).sum()) for key in encoder.counted if key in columns}
    if "targets" not in columns:
        raise TaskError(f"task {task.name!r}: encode() must return a column `targets`; it returned {sorted(columns)}")
    if not len(columns["targets"]):
        return Encoded(name, len(chunk), 0, counts=counts, left_out=left_out)
    aside = directory / f".{name}.{os.getpid()}.new"
    written = rows.write(aside, columns)
    digest = file_digest(aside)
    aside.replace(directory / name)
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
def _load(task: str, directory: Path, options: str, learned_at: int) -> Task:
    """Load the task once for all the chunks of a process; `options` is JSON, which can be hashed."""
    return get(task).load(directory, json.loads(options))
