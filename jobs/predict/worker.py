"""A worker of a prediction: one process that loads the model once, and works off a shard at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.precision import Precision
from jobs import hub_folder, noise
from jobs.data.examples import BadRow
from jobs.predict import parts
from jobs.predict.parts import Answer, Entry, Form
from jobs.predict.places import Place
from jobs.predict.predictors import Predictor, Setup, answers, loaded_task, predictor
from jobs.predict.rows import Shard, Tolerance
from jobs.run_folder import RunFolder
from jobs.spec import JobSpec
from jobs.tasks import Task, get
from jobs.worker.evaluate import During, Say, unsaid, unwatched
from jobs.worker.watched import watched

CUT = "answers that predict.generation.max_tokens or the model's context has cut"


@dataclass(frozen=True)
class Work:
    """What all workers of a prediction have in common."""

    spec: JobSpec
    directory: Path | str
    """The model's, or its hub id."""
    precision: Precision
    run: RunFolder
    form: Form
    generation: Mapping[str, Any]
    files: Place | None = None
    """Where parts are written; None: in the run's folder."""
    token: str = ""
    """What says that this node has what it needs (jobs/storage/courier.py); "" where all share the run's folder."""


class Worker:
    """One worker: all that it does, without whoever watches it."""

    def __init__(self, work: Work) -> None:
        """Assign only; `load` comes first."""
        self._work = work
        self._task: Task | None = None
        self._predictor: Predictor | None = None

    def load(self, during: During = unwatched, say: Say = unsaid) -> None:
        """Load the model."""
        import torch

        spec, directory = self._work.spec, self._work.directory
        threads = max(1, int(spec.resources.cpus_per_worker))
        torch.set_num_threads(threads)
        self._task = loaded_task(get(spec.task.name)(spec.task.options), directory)
        settings = (self._work.precision, spec.predict.batch_size, threads, self._work.generation)
        # A task that generates has no rows whose length the model would have to take: it loads as a server does.
        answering = type(self._task).load(Path(directory)) if self._task.generates else self._task
        folder = Path(directory) if Path(directory).is_dir() else hub_folder.fetched(str(directory))
        self._predictor = predictor(Setup(answering, directory, *settings, folder))
        say([*answering.said, *self._predictor.said])

    def do(self, shard: Shard, during: During = unwatched, say: Say = unsaid) -> Entry:
        """Answer a shard and write its part.

        Raises:
            UserError: a row cannot be used, and `data.bad_rows` is stop; or the output cannot take its answer.
        """
        assert self._task is not None, "`load` comes first"
        assert self._predictor is not None
        size, made = self._work.spec.predict.batch_size, list[Answer]()
        for begin in range(0, len(shard.rows), size):
            with during("pass"):
                rows = shard.rows[begin : begin + size]
                made += answers(self._task, self._predictor, shard.first + begin, rows)
            self._check(made[begin:])
        with during("write"):
            entry = parts.write(self._work.files or self._work.run.path / parts.FOLDER, shard, made, self._work.form)
        self._check(entry.bad_rows().values())
        return replace(entry, counts=counts(made))

    def close(self) -> None:
        """End what the predictor has running."""
        if self._predictor is not None:
            self._predictor.close()

    def _check(self, made: Iterable[Answer]) -> None:
        """Let the first row with an error end the job, where the spec says so."""
        if self._work.spec.data.bad_rows == "stop":
            for answer in made:
                if isinstance(answer, BadRow):
                    Tolerance(0).add(0, answer)


class Watched:
    """A worker as an actor of Ray's, each of whose calls ends the process if it hangs (jobs/worker/watchdog.py)."""

    def __init__(self, work: Work, number: int) -> None:
        """Assign only; `start` does the work."""
        self._work, self._number, self._worker = work, number, Worker(work)

    def start(self) -> None:
        """Load the model, within `failures.hang_after_s`."""
        noise.quiet()
        self._watched(self._worker.load)

    def do(self, shard: Shard) -> Entry:
        """Answer a shard and write its part; see Worker."""
        entry: Entry = self._watched(self._worker.do, shard)
        return entry

    def _watched(self, function: Callable[..., Any], *arguments: Any) -> Any:
        longest_s = self._work.spec.failures.hang_after_s
        return watched(self._work.run, self._work.token, longest_s, self._number, function, *arguments)


def counts(made: list[Answer]) -> dict[str, int]:
    """Count what answers say of themselves: that they were cut, and what else a column says by `True`."""
    found: Counter[str] = Counter()
    for answer in made:
        if isinstance(answer, Mapping):
            found.update(name for name, value in answer.items() if value is True)
            found[CUT] += answer.get("finish_reason") == "length"
    return dict(+found)
