"""The model that a job starts from: built, or loaded; adapted; and looked at once before it is divided."""

from __future__ import annotations

from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path

import torch

from cluster.errors import UserError
from jobs.spec import JobSpec
from jobs.tasks import Task
from jobs.worker import lora, weights


class Unbuildable(UserError):
    """The model that the spec describes cannot be built or run, and will not be at a second try."""


def ready_model(spec: JobSpec, task: Task, parent: Path | None, columns: Set[str]) -> tuple[torch.nn.Module, list[str]]:
    """Return what is trained, with adapters where the spec wants them, and what is to be said of it.

    Args:
        columns: of the rows that it will see.

    Raises:
        UserError: the weights cannot be loaded, or the model cannot be built or run.
    """
    model = fresh_model(spec, task, parent)
    said = list(task.said)
    with described(spec):
        if spec.model.lora is not None and spec.training is not None:
            torch.manual_seed(spec.training.seed)
            model = lora.add_lora(model, spec.model.lora)
            said.insert(0, lora.described(model))
        return model, [*said, *task.prepare_model(model, columns)]


def fresh_model(spec: JobSpec, task: Task, parent: Path | None) -> torch.nn.Module:
    """Make the model the job starts from, in fp32 on the CPU: random weights by the seed alone, or the parent's."""
    assert spec.training is not None
    torch.manual_seed(spec.training.seed)
    if parent is not None:
        with weights.readable(parent):
            return task.load_model(parent, torch.float32, spec.model.config).train()
    assert spec.model.architecture is not None
    with described(spec):
        return task.build(spec.model.architecture, spec.model.config)


@contextmanager
def described(spec: JobSpec) -> Iterator[None]:
    """Turn what goes wrong while a model is built and first run into a sentence: the spec alone decides it.

    Raises:
        Unbuildable: it went wrong. Too little memory, and what the system fails at, are no such errors.
    """
    try:
        yield
    except Exception as error:
        if not is_the_specs(error):
            raise
        model = spec.model.architecture or spec.model.source
        given = f" with model.config {dict(spec.model.config)}" if spec.model.config else ""
        said = " ".join(str(error).split())[:300]
        raise Unbuildable(f"model: {model}{given} cannot be built and run: {type(error).__name__}: {said}") from error


def is_the_specs(error: Exception) -> bool:
    """Say whether building again would fail the same way. Pure."""
    passing = (UserError, MemoryError, OSError)
    return not isinstance(error, passing) and "out of memory" not in str(error) and "CUDA" not in str(error)
