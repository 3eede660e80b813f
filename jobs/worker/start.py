"""The model that a job starts from: built, or loaded; adapted; and looked at once before it learns."""

from __future__ import annotations

from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cluster.errors import UserError
from jobs.spec import JobSpec
from jobs.tasks import Task
from jobs.worker import lora, weights
from jobs.worker.partition import Fill
from jobs.worker.recorded import Recorded, Unrecordable, record


class Unbuildable(UserError):
    """The model that the spec describes cannot be built or run, and will not be at a second try."""


@dataclass
class Start:
    """The model that a job starts from, in fp32."""

    model: torch.nn.Module
    """On the CPU; its parameters on the meta device where it is to be divided without ever being whole."""
    fill: Fill | None = None
    """Fills in any slice of a parameter, where that is known without the model; None: the model has its weights."""
    said: list[str] = field(default_factory=list)
    """What is to be said of it."""


def begin(spec: JobSpec, task: Task, parent: Path | None, in_parts: bool = False) -> Start:
    """Return what is trained, with adapters where the spec wants them.

    Args:
        in_parts: whether it will be divided by ZeRO stage 3, so that no rank need have it whole.

    Raises:
        UserError: the weights cannot be loaded, or the model cannot be built.
    """
    assert spec.training is not None
    begun = _fresh(spec, task, in_parts) if parent is None else Start(_loaded(spec, task, parent))
    begun.said += task.said
    if spec.model.lora is not None:
        with described(spec):
            torch.manual_seed(spec.training.seed)
            begun.model = lora.add_lora(begun.model, spec.model.lora)
            begun.said.insert(0, lora.described(begun.model))
    return begun


def look(spec: JobSpec, task: Task, model: torch.nn.Module, columns: Set[str]) -> list[str]:
    """Have the task look at the model once; return what is to be said. Collective where it is in parts.

    Args:
        columns: of the rows that it will see.

    Raises:
        UserError: the model cannot be run.
    """
    with described(spec):
        return task.prepare_model(model, columns)


def fresh_model(spec: JobSpec, task: Task, parent: Path | None) -> torch.nn.Module:
    """Make the model the job starts from, whole, in fp32 on the CPU: drawn by the seed alone, or the parent's."""
    return _fresh(spec, task, False).model if parent is None else _loaded(spec, task, parent)


def _fresh(spec: JobSpec, task: Task, in_parts: bool) -> Start:
    recorded = _recorded(spec, task)
    if isinstance(recorded, Recorded):
        model = recorded.model if in_parts else recorded.materialise()
        return Start(model.train(), recorded.fill)
    said = [f"{recorded}: each worker builds it whole"] if in_parts else []
    assert spec.training is not None
    assert spec.model.architecture is not None
    torch.manual_seed(spec.training.seed)
    with described(spec):
        return Start(task.build(spec.model.architecture, spec.model.config).train(), said=said)


def _recorded(spec: JobSpec, task: Task) -> Recorded | Unrecordable:
    assert spec.training is not None
    assert spec.model.architecture is not None
    architecture, config = spec.model.architecture, spec.model.config
    try:
        with described(spec):
            return record(lambda: task.build(architecture, config), spec.training.seed)
    except Unrecordable as why:
        return why


def _loaded(spec: JobSpec, task: Task, parent: Path) -> torch.nn.Module:
    with weights.readable(parent):
        return task.load_model(parent, torch.float32, spec.model.config).train()


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
    passing = (UserError, MemoryError, OSError, Unrecordable)
    return not isinstance(error, passing) and "out of memory" not in str(error) and "CUDA" not in str(error)
