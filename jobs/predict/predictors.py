"""What answers rows: the task's own `predict`, or an engine for a task that generates. A table says which, by name.

Jobs do not import the serving half. What generates is looked up here by its path when a worker starts, as tasks and
engines are; what it is given and returns is plain (serve/engines/offline.py).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from cluster.errors import UserError
from cluster.precision import Precision
from jobs.data.examples import BadRow, bounded
from jobs.predict.parts import Answer
from jobs.predict.rows import Row
from jobs.tasks import Task, TaskSetupError

PREDICTIVE, GENERATIVE = "jobs.predict.predictors:load", "serve.engines.offline:load"
"""What makes the predictor of a task that answers at once, and of one that generates."""
GENERATED = ("text", "finish_reason", "prompt_tokens", "completion_tokens")
"""The columns of an answer that was generated."""


class Predictor(Protocol):
    """A model that answers."""

    said: Sequence[str]
    """Sentences for the log: what of the model's own settings is not honoured."""

    def answer(self, numbered: Sequence[tuple[int, Any]]) -> list[dict[str, Any] | Exception]:
        """Answer instances, each with the number of its row; an exception stands for one that is itself at fault."""

    def close(self) -> None:
        """End what it has running."""


@dataclass(frozen=True)
class Setup:
    """What a predictor is made of; all of it is plain, or a task's own."""

    task: Task
    """It knows what the model learned."""
    directory: Path | str
    """The model's directory, or its hub id."""
    precision: Precision
    batch_size: int
    threads: int
    generation: Mapping[str, Any]
    """`predict.generation`, without what is left out."""
    settings: Path | None = None
    """The folder with the model's generation_config.json; None where there is none."""


def predictor(setup: Setup) -> Predictor:
    """Load the model, with what its kind of task is answered by."""
    module, _, function = (GENERATIVE if setup.task.generates else PREDICTIVE).partition(":")
    load: Callable[[Setup], Predictor] = getattr(importlib.import_module(module), function)
    return load(setup)


def load(setup: Setup) -> Predictor:
    """Load the model of a task that answers at once."""
    import torch

    from jobs.worker.export import DTYPES

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = setup.task.load_model(Path(setup.directory), DTYPES[setup.precision]).to(device)
    return TaskPredictor(setup.task, model)


class TaskPredictor:
    """Answers by the task's `predict`."""

    said: Sequence[str] = ()

    def __init__(self, task: Task, model: Any) -> None:
        self._task, self._model = task, model

    def answer(self, numbered: Sequence[tuple[int, Any]]) -> list[dict[str, Any] | Exception]:
        """Answer some instances; where they fail together, each half by itself, down to those that are at fault."""
        import torch

        with torch.inference_mode():
            return self._answer([instance for _, instance in numbered])

    def close(self) -> None:
        """Do nothing: nothing runs between two calls."""

    def _answer(self, instances: list[Any]) -> list[dict[str, Any] | Exception]:
        try:
            answers = self._task.predict(self._model, instances)
        except (TaskSetupError, MemoryError):
            raise
        except Exception as error:  # whatever a row makes of a task's or a user's own code; memory of a GPU, too
            if len(instances) == 1:
                return [error]
            half = len(instances) // 2
            return [*self._answer(instances[:half]), *self._answer(instances[half:])]
        if len(answers) != len(instances):
            raise UserError(f"task {self._task.name!r} gave {len(answers)} predictions for {len(instances)} instances")
        return list(answers)


def loaded_task(task: Task, parent: Path | str) -> Task:
    """Let a task take over what a model learned, as phase `evaluate` does.

    Raises:
        UserError: the model does not say it, or has learned something else than the task's options ask for.
    """
    if not task.inherit(parent):
        given = getattr(getattr(task.options, "tokenizer", None), "is_given", False)
        raise UserError(
            f"phase predict needs what a model has learned, and {parent} does not say that for {task.name} "
            f"({' or '.join(task.learned_files)}): {'leave task.tokenizer out' if given else 'fine-tune it first'}"
        )
    return task


def predicted_columns(task: Task) -> list[str]:
    """Return the names of the columns of a task's predictions, as far as it says them before it predicts."""
    return list(GENERATED) if task.generates else [part["name"] for part in task.outputs()]


def answers(task: Task, predictor: Predictor, first: int, rows: Sequence[Row]) -> list[Answer]:
    """Answer some rows; one that cannot be used, or that the model fails on, is answered by the reason.

    Args:
        first: the number of the first of them.
    """
    given = [row if isinstance(row, BadRow) else bounded(partial(task.instance, row), row.where) for row in rows]
    good = [(number, instance) for number, instance in enumerate(given, first) if not isinstance(instance, BadRow)]
    said = iter(predictor.answer(good) if good else [])
    made = (
        _of(next(said), row) if not isinstance(each, BadRow) else each for each, row in zip(given, rows, strict=True)
    )
    return list(made)


def _of(said: dict[str, Any] | Exception, row: Row) -> Answer:
    if not isinstance(said, Exception):
        return said
    reason = " ".join(str(said).split())
    return BadRow(row.where, reason if isinstance(said, UserError) else f"{type(said).__name__}: {reason}")
