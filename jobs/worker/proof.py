"""Proof that the exported files hold the model that was trained: both are measured on the same rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.precision import Precision
from jobs.checkpoint import resume
from jobs.data.rows import Rows
from jobs.tasks import Task, adapters
from jobs.worker.by_source import Sources, summarised
from jobs.worker.evaluate import NONE, check_finite, joined, measure
from jobs.worker.export import DTYPES, check_loss
from jobs.worker.setup import Worker

TRAINING_ROWS = 32
"""So many training rows are measured where nothing is held out."""


@dataclass(frozen=True)
class Measured:
    """The trained model's loss, and how it was measured."""

    loss: float
    rows: Rows
    limit: int | None
    seed: int
    micro_batch: int
    what: str
    """The rows, for a message."""
    sources: Sources = field(default_factory=dict)
    """Of a mixture, whose rows share no pass."""


def of_trained(worker: Worker) -> Measured:
    """Return the last evaluation's loss; with nothing held out, that of some training rows. Collective.

    Raises:
        NotFinite: it is NaN or infinite, on every rank.
    """
    seed, micro_batch = worker.spec.data.split_seed, _micro_batch(worker)
    if len(worker.eval_rows):
        loss, limit = worker.evaluations["final"]["loss"], worker.spec.data.eval_max_rows
        check_finite(loss, "the trained model on the held-out rows")
        return Measured(loss, worker.eval_rows, limit, seed, micro_batch, "the held-out rows", worker.held_out)
    loss = worker.task.summarise(measure_live(worker, worker.rows, TRAINING_ROWS))["loss"]
    check_finite(loss, "the trained model on some training rows")
    return Measured(loss, worker.rows, TRAINING_ROWS, seed, micro_batch, "some training rows")


def measure_live(worker: Worker, rows: Rows, limit: int | None, sources: Sources = NONE) -> dict[str, Any]:
    """Return the sums over `limit` rows, each rank measuring its share on the model in training. Collective."""
    return _together(worker, worker.task, worker.engine.model, rows, limit, sources)


def of_read(worker: Worker, loaded: Task, model: torch.nn.Module, trained: Measured) -> None:
    """Measure a model that all ranks have read from its files, whole or in parts, and compare. Collective.

    Args:
        loaded: the task as its files have it.
        model: in parts it is an engine, which has it as its `module`.

    Raises:
        WrongExport: the losses differ by more than rounding.
    """
    module: torch.nn.Module = model.module if worker.engine.sliceable else model  # type: ignore[assignment]
    loaded.prepare_model(module, trained.rows.columns)
    if worker.shared is not None:
        worker.shared.attach(module)
    sums = _together(worker, loaded, model, trained.rows, trained.limit, trained.sources)
    check_loss(trained.loss, summarised(loaded, sums)["loss"], worker.precision, trained.what)


def _together(
    worker: Worker, task: Task, model: torch.nn.Module, rows: Rows, limit: int | None, sources: Sources
) -> dict[str, Any]:
    engine = worker.engine
    sums = measure(
        task,
        model,
        rows,
        limit=limit,
        seed=worker.spec.data.split_seed,
        micro_batch=_micro_batch(worker),
        device=engine.device,
        rank=worker.place.reader,
        world_size=worker.place.readers,
        part=worker.part,
        sources=sources,
    )
    kept = {key: value for key, value in sums.items() if isinstance(value, np.ndarray)}
    added = {key: value for key, value in sums.items() if key not in kept}
    whole = dict(zip(added, engine.all_sum(*added.values()), strict=True))
    return {**whole, **joined(resume.gathered(kept))} if task.gathered else whole


def _micro_batch(worker: Worker) -> int:
    if worker.shared is not None:  # rows are as long as there is room for
        return worker.micro_batch
    return max(worker.micro_batch, 8)  # no gradients: there is room for more than in training


def of_files(directory: Path, trained: Measured, task: Task, precision: Precision, device: torch.device) -> None:
    """Load what was written, as phase `evaluate` and a server do, and compare.

    Args:
        task: its class and options are what the files are loaded with.

    Raises:
        WrongExport: the losses differ by more than rounding.
    """
    try:
        found = _loss(directory, trained, task, precision, device)
    except torch.OutOfMemoryError:  # the trained model is still there, perhaps divided over many devices
        torch.cuda.empty_cache()
        found = _loss(directory, trained, task, precision, torch.device("cpu"))
    check_loss(trained.loss, found, precision, trained.what)


def of_model(model: torch.nn.Module, trained: Measured, task: Task, precision: Precision, device: torch.device) -> None:
    """Measure a model that was made again of its files, and compare.

    Args:
        model: in fp32; it becomes what the precision computes with.

    Raises:
        WrongExport: the losses differ by more than rounding.
    """
    adapters.as_type(model, DTYPES[precision]).to(device).eval()
    check_loss(trained.loss, _loss_of(model, trained, task, device), precision, trained.what)


def _loss(directory: Path, trained: Measured, task: Task, precision: Precision, device: torch.device) -> float:
    loaded = type(task).load(directory, task.options)
    model = loaded.load_model(directory, DTYPES[precision]).to(device)
    return _loss_of(model, trained, loaded, device)


def _loss_of(model: torch.nn.Module, trained: Measured, task: Task, device: torch.device) -> float:
    task.prepare_model(model, trained.rows.columns)
    sums = measure(
        task,
        model,
        trained.rows,
        limit=trained.limit,
        seed=trained.seed,
        micro_batch=trained.micro_batch,
        device=device,
        sources=trained.sources,
    )
    return summarised(task, sums)["loss"]
