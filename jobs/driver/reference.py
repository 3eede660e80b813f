"""The columns that a model makes of the rows before anything learns from them: once, and kept with the prepared data.

storage/data/<digest>/reference-<digest of the model's weights and of how it computes>/train-00000.arrow …
                                                                    and of every other file of rows, by its name

Which model: the one that the job starts from. Where a model is only measured, or quantised, the one that it was made
from, as its tandem.json says; without that it cannot be told what its answers are to be compared with.

Where the storage is an object store they are there, below the data (jobs/data/stored.py).

Tasks that load the model whole make them. A training at ZeRO stage 3, whose model may be larger than any of them, makes
them by itself before it learns.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from dataclasses import replace
from pathlib import Path

from cluster.errors import UserError
from cluster.precision import Precision
from jobs import lineage, progress
from jobs.checkpoint.store import Written
from jobs.data.preparation import trains
from jobs.data.prepare import Prepared
from jobs.driver import shares
from jobs.driver.job import Job
from jobs.spec import JobSpec
from jobs.tasks import get
from jobs.worker import zero
from jobs.worker.reference import store_share, write_share
from tracking import manifest, registry
from tracking.errors import TrackingError


def added(job: Job, prepared: Prepared) -> Prepared:
    """Return the prepared data with the columns that its task asks of a model, made now or found.

    Raises:
        UserError: which model that is cannot be told.
    """
    if not get(job.spec.task.name)(job.spec.task.options).refers():
        return prepared
    model, called = model_of(job)
    name = f"reference-{_digest(job, model)[:16]}"
    place = Path(prepared.directory) / name
    if job.stored.fetch_columns(place) if job.stored else place.is_dir():
        progress.say(f"reference {called}: what it makes of the rows is known from before")
    elif by_the_group(job.spec, job.base, job.precision, job.folder.last_step()):
        progress.say(f"reference {called}: the workers make its answers in parts, before they learn")
    else:
        progress.say(f"reference {called}: its answers are what the model's are compared with")
        (_make_stored if job.stored else _make)(job, prepared, model, place)
    return replace(prepared, reference=name)


def by_the_group(spec: JobSpec, base: Path, precision: Precision, behind: int) -> bool:
    """Return whether the training group makes the columns, by the model that it has in parts as it begins.

    Args:
        base: where relative paths start.
        behind: steps that the run has behind it: its model is no reference any more.
    """
    if spec.training is None or not trains(spec) or behind:
        return False
    named = zero.read_named(spec.training, base)
    return zero.sliceable(zero.deepspeed_config(spec.training, 1, 1, precision=precision, on_gpu=False, base=named))


def model_of(job: Job) -> tuple[Path | str, str]:
    """Return the model that answers are compared with, a directory or a hub id, and what it is called.

    Raises:
        UserError: the model that is measured does not say what it was made from, or that is not there.
    """
    assert job.parent is not None, "the task refuses to compare without a model to start from"
    if trains(job.spec):
        return job.parent, str(job.parent_uri or job.parent)
    try:
        source = made_from(Path(job.parent), job.base)
        return _folder(source, job.base), source
    except TrackingError as error:
        raise UserError(
            f"task.objective compares answers with the model that {job.spec.model.source} was made from, and that is "
            f"not known here: {error}. Leave task.objective out, to measure conversations"
        ) from error


def made_from(directory: Path, base: Path) -> str:
    """Return what a model was trained from; of a quantised one, what the model in full precision was.

    Args:
        base: where relative paths start.

    Raises:
        TrackingError: it does not say.
    """
    written = manifest.read(directory)
    if written.parent is None:
        raise TrackingError(f"{manifest.FILE_NAME} in {directory} names no parent")
    return made_from(_folder(written.parent, base), base) if written.quantization else written.parent


def _folder(source: str, base: Path) -> Path:
    return registry.resolve(registry.located(source, base))


def _digest(job: Job, model: Path | str) -> str:
    """Digest what decides the columns: the weights (without them, their name), the precision, the config's entries."""
    weights = lineage.weights_digest(model) or str(model)
    content = [weights, job.precision, dict(job.spec.model.config)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _make_stored(job: Job, prepared: Prepared, model: Path | str, place: Path) -> None:
    """Have tasks on any node store the columns of all files, and this node fetch them."""
    assert job.stored is not None, "nodes share no folder"
    files = [*prepared.train_files, *prepared.eval_files]
    workers = min(job.spec.resources.fewest, len(files))
    arguments = (job.stored.uri, place.name, job.spec, str(model), prepared, job.precision)
    made: dict[str, Written] = {}
    progress.report("reference", 0, workers)
    with job.stored.on_nodes(job.spec, prepared, model if isinstance(model, Path) else None) as token:
        begun = [
            shares.begin(job, token, rank, store_share, *arguments, files[rank::workers]) for rank in range(workers)
        ]
        for done, share in enumerate(begun, 1):
            made |= shares.result(job, share)
            progress.report("reference", done, workers)
    job.stored.keep_columns(place, made)


def _make(job: Job, prepared: Prepared, model: Path | str, place: Path) -> None:
    """Write the columns of all files into a folder that gets its name once all are there; others may do the same."""
    files = [*prepared.train_files, *prepared.eval_files]
    partial = place.with_name(f".{place.name}.{secrets.token_hex(4)}.partial")
    partial.mkdir()
    try:
        workers = min(job.spec.resources.fewest, len(files))
        arguments = (job.spec, str(model), prepared, job.precision, str(partial))
        progress.report("reference", 0, workers)
        begun = [shares.begin(job, "", rank, write_share, *arguments, files[rank::workers]) for rank in range(workers)]
        for done, share in enumerate(begun, 1):
            shares.result(job, share)
            progress.report("reference", done, workers)
        try:
            partial.rename(place)
        except OSError:  # another job was faster: its columns are the same
            if not place.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
