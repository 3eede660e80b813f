"""What a prediction is bound to: where it is written, how a task may be asked, and what must not change under a run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster import store_uri
from cluster.errors import UserError
from jobs import hub_folder, lineage
from jobs.data import identity
from jobs.data.compression import kind
from jobs.data.examples import Source
from jobs.predict import places
from jobs.predict.places import Place
from jobs.predict.rows import Survey
from jobs.spec import JobSpec
from jobs.spec_predict import GenerationSpec
from jobs.tasks import Task, get
from jobs.tasks.own_code import code_digest

NAMES = {
    "input": "the input (data.predict), or a file that it names,",
    "weights": "the weights behind model.from",
    "learned": "the tokenizer, chat template, labels or generation_config.json behind model.from",
    "code": "the code of the task",
}
SHARD_ROWS = {True: 64, False: 1024}
"""Rows of a shard by whether the task generates, where the spec does not say."""


def output_of(spec: JobSpec, base: Path, run: Place) -> Place:
    """Return the file that the job writes: a path, or the URI of a store.

    Args:
        base: where relative paths start.
        run: the run's folder, on a disk or in a store.

    Raises:
        UserError: it is the URI of nothing that can be written or may be kept, or a path within a folder that the
            cluster removes behind the job.
    """
    named = spec.predict.output
    if named is None:
        return places.below(run, f"predictions.{spec.predict.written_as}")
    if store_uri.is_store(named):
        return store_uri.checked(named, "predict.output")
    if "://" in named:
        raise UserError(
            f"predict.output: {named!r} names no store that can be written: give s3://bucket/file, or a path"
        )
    path = base / Path(named).expanduser()
    if "runtime_resources" in path.parts:  # where Ray unpacks the copy of a folder that came with a job
        raise UserError(
            f"predict.output: {named!r} starts at the spec's folder, which here is a copy that goes with the job: give "
            "the whole path, or leave it out"
        )
    return path


def generation_of(spec: JobSpec, task: Task) -> dict[str, Any]:
    """Return the settings of generation that are given; none for a task that does not generate.

    Raises:
        UserError: they are given for one that does not, or the task does not say what it predicts from.
    """
    if type(task).instance is Task.instance:
        raise UserError(
            f"task {task.name!r} does not say what of an example it predicts from: give its class a method `instance`"
        )
    if not task.generates:
        if spec.predict.generation is not None:
            raise UserError(f"predict.generation is for tasks that generate, and {task.name!r} does not: leave it out")
        return {}
    given = (spec.predict.generation or GenerationSpec()).model_dump()
    return {name: value for name, value in given.items() if value is not None}


def decided_by(spec: JobSpec, parent: Path | str, found: Survey) -> dict[str, str]:
    """Return what decides the output of a run, in parts that can be named: part → digest.

    Args:
        parent: the model's directory, or its hub id.
    """
    task = get(spec.task.name)
    folder = Path(parent) if Path(parent).is_dir() else hub_folder.cached(str(parent))
    config = folder / "generation_config.json" if folder else None
    sampling = config.read_bytes() if task.generates and config is not None and config.is_file() else b""
    learned = identity.learned_digest(parent, task) + hashlib.sha256(sampling).hexdigest()
    code = f"{task.version} {code_digest(spec.task.name, beside=True) or ''}"
    return {"input": found.digest, "weights": lineage.weights_digest(parent), "learned": learned, "code": code}


def check_same(before: Mapping[str, Any], now: Mapping[str, str]) -> None:
    """Refuse to go on where the rest of an output would be made of something else.

    Raises:
        UserError: names what has changed, and the way out.
    """
    changed = [said for name, said in NAMES.items() if name in before and before[name] != now[name]]
    if changed:
        raise UserError(
            f"the run cannot go on: since it began, {' and '.join(changed)} changed. Bring it back as it was, or begin "
            "a new run with --set checkpoint.resume=never"
        )


def shard_rows(spec: JobSpec, task: Task) -> int:
    """Return how many rows a shard has at most."""
    return spec.predict.shard_rows or SHARD_ROWS[task.generates]


def known_types(source: Source) -> dict[str, Any]:
    """Return the Arrow types of the columns, where the input is Parquet and its files agree in them."""
    import pyarrow
    import pyarrow.parquet

    if any(kind(Path(part.origin)) != ".parquet" for part in source.singles):
        return {}
    try:
        schemas = [pyarrow.parquet.read_schema(part.origin) for part in source.singles]
    except (OSError, pyarrow.ArrowException):  # a bad row, or the end of the job: reading the rows says it
        return {}
    of = {name: [schema.field(name).type for schema in schemas if name in schema.names] for name in schemas[0].names}
    return {name: kinds[0] for name, kinds in of.items() if len(set(kinds)) == 1}
