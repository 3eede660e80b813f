"""What a model makes of encoded rows, kept beside them: by a Ray task for each share of the files, or a training group.

A task has the model whole. A group that trains at ZeRO stage 3 asks the model that it has in parts, before it learns.
"""

from __future__ import annotations

import math
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from cluster.errors import UserError
from cluster.precision import Precision
from jobs.checkpoint import resume
from jobs.checkpoint.store import Store, Written
from jobs.data import rows, stored
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


def store_share(
    uri: str,
    name: str,
    spec: JobSpec,
    model_from: str,
    prepared: Prepared,
    precision: Precision,
    files: Sequence[str],
    during: During = unwatched,
    say: Say = unsaid,
) -> dict[str, Written]:
    """Do the same where nodes share no folder: the files go to the object store; return what each holds.

    Args:
        uri: of the store.
        name: of the columns' folder, within the data's.
    """
    directory = Path(prepared.directory)
    aside = directory / f".{name}.{secrets.token_hex(4)}.partial"
    aside.mkdir()
    try:
        write_share(spec, model_from, prepared, precision, str(aside), files, during, say)
        return {file: stored.put_columns(Store(uri), directory, name, aside / file) for file in files}
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def without_missing(prepared: Prepared, uri: str = "") -> Prepared:
    """Return the data as it is without columns that the group is to make: the driver left them to it.

    Args:
        uri: of the store, where nodes share no folder: what is there counts, as all ranks find the same then; "" else.
    """
    if not prepared.reference:
        return prepared
    directory = Path(prepared.directory)
    if uri:
        is_there = stored.fetch_columns(Store(uri), directory, prepared.reference)
    else:
        is_there = (directory / prepared.reference).is_dir()
    return prepared if is_there else replace(prepared, reference="")


def make_in_parts(
    engine: Engine,
    task: Task,
    prepared: Prepared,
    step: int,
    during: During = unwatched,
    uri: str = "",
    writes: bool | None = None,
) -> None:
    """Make the columns of all files with the model in training, which has learned nothing yet. Collective.

    Args:
        step: the steps that are behind.
        uri: of the store that gets them, where nodes share no folder; "" else.
        writes: whether this rank writes them on its node; None: rank 0 does.

    Raises:
        UserError: it has learned.
    """
    target = Path(prepared.directory) / prepared.reference
    if step:
        raise UserError(
            f"the reference's answers, {target}, are gone, and the model has learned {step} steps since: bring them "
            "back, or begin a new run with --set checkpoint.resume=never"
        )
    writes = engine.rank == 0 if writes is None else writes
    partial = target.with_name(f".{target.name}.{resume.attempt_name()}-{engine.rank}.partial")
    if writes:
        partial.mkdir()
    was_training = engine.model.training
    engine.model.eval()
    files = (*prepared.train_files, *prepared.eval_files)
    for file in files:
        columns = _gathered(engine, task, rows.Rows([Path(prepared.directory) / file]), during)
        if writes:
            rows.write(partial / file, columns)
    engine.model.train(was_training)
    if writes:
        try:
            partial.rename(target)
        except OSError:  # another job was faster: its columns are the same
            if not target.is_dir():
                raise
            shutil.rmtree(partial, ignore_errors=True)
    if uri and engine.rank == 0:
        with during("reference"):
            made = {file: stored.put_columns(Store(uri), target.parent, target.name, target / file) for file in files}
            stored.push_columns(Store(uri), target.parent, target.name, made)
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
