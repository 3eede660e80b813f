"""What a model makes of encoded rows, kept beside them: by a Ray task for each share of the files, or a training group.

A task has the model whole. A group that trains at ZeRO stage 3 asks the model that it has in parts, before it learns.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from cluster.errors import UserError
from cluster.precision import Precision
from jobs.checkpoint import resume
from jobs.data import rows
from jobs.data.prepare import Prepared
from jobs.spec import JobSpec
from jobs.tasks import Columns, Task
from jobs.worker.deepspeed_engine import Engine
from jobs.worker.evaluate import During, Say, unsaid, unwatched

MICRO_BATCH = 16


def write_share(
    spec: JobSpec,
    model_from: str,
    prepared: Prepared,
    precision: Precision,
    target: str,
    files: Sequence[str],
    during: During = unwatched,
    say: Say = unsaid,
) -> int:
    """Have a model make the task's reference columns of some files' rows; return of how many.

    Args:
        model_from: the model's directory or hub id.
        target: the folder that gets a file of each name; one that is there already is kept.
    """
    from jobs import noise
    from jobs.worker.export import DTYPES

    noise.quiet()
    torch.set_num_threads(max(1, int(spec.resources.cpus_per_worker)))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task = prepared.task(spec)
    model = task.load_model(Path(model_from), DTYPES[precision], spec.model.config).to(device)
    return sum(_write(task, model, Path(prepared.directory) / file, Path(target) / file, during) for file in files)


def _write(task: Task, model: torch.nn.Module, source: Path, target: Path, during: During) -> int:
    found = rows.Rows([source])
    if not target.is_file():
        partial = target.with_name(f".{target.name}.partial")
        rows.write(partial, columns_of(task, model, found, during))
        partial.rename(target)
    return len(found)


def columns_of(task: Task, model: torch.nn.Module, found: rows.Rows, during: During = unwatched) -> Columns:
    """Return the task's reference columns of N rows, each (N, …), in batches that need no gradients."""
    parts: list[Columns] = []
    with torch.inference_mode():
        for start in range(0, len(found), MICRO_BATCH):
            with during("pass"):
                chosen = np.arange(start, min(start + MICRO_BATCH, len(found)))
                parts.append(task.reference(model, found.take(chosen)))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def without_missing(prepared: Prepared) -> Prepared:
    """Return the data as it is without columns that the group is to make: the driver left them to it."""
    is_missing = prepared.reference and not (Path(prepared.directory) / prepared.reference).is_dir()
    return replace(prepared, reference="") if is_missing else prepared


def make_in_parts(engine: Engine, task: Task, prepared: Prepared, step: int, during: During = unwatched) -> None:
    """Make the columns of all files with the model in training, which has learned nothing yet. Collective.

    Args:
        step: the steps that are behind.

    Raises:
        UserError: it has learned.
    """
    target = Path(prepared.directory) / prepared.reference
    if step:
        raise UserError(
            f"the reference's answers, {target}, are gone, and the model has learned {step} steps since: bring them "
            "back, or begin a new run with --set checkpoint.resume=never"
        )
    partial = target.with_name(f".{target.name}.{resume.attempt_name()}.partial")
    if engine.rank == 0:
        partial.mkdir()
    was_training = engine.model.training
    engine.model.eval()
    for file in (*prepared.train_files, *prepared.eval_files):
        columns = _gathered(engine, task, rows.Rows([Path(prepared.directory) / file]), during)
        if engine.rank == 0:
            rows.write(partial / file, columns)
    engine.model.train(was_training)
    if engine.rank == 0:
        try:
            partial.rename(target)
        except OSError:  # another job was faster: its columns are the same
            if not target.is_dir():
                raise
            shutil.rmtree(partial, ignore_errors=True)
    torch.distributed.barrier()


def _gathered(engine: Engine, task: Task, found: rows.Rows, during: During) -> Columns:
    """Return the columns of N rows, each (N, …), on every rank; each made every W-th batch. Collective.

    Each rank makes as many passes, in which weights are gathered; one without rows left passes the first one.
    """
    mine: dict[int, Columns] = {}
    batches = math.ceil(len(found) / MICRO_BATCH)
    with torch.no_grad():  # not inference_mode: what it makes of gathered weights, no backward pass takes
        for index in range(engine.rank, math.ceil(batches / engine.world_size) * engine.world_size, engine.world_size):
            with during("reference"):
                start = index * MICRO_BATCH
                chosen = np.arange(start, min(start + MICRO_BATCH, len(found)))
                made = task.reference(engine.model, found.take(chosen if len(chosen) else np.zeros(1, dtype=np.int64)))
                if len(chosen):
                    mine[index] = made
    parts = {index: columns for rank in resume.gathered(mine) for index, columns in rank.items()}
    return {name: np.concatenate([parts[index][name] for index in range(batches)]) for name in parts[0]}
