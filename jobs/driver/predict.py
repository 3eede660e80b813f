"""Phase `predict`: a model over all rows of `data.predict`, each of them once, in order, whatever fails meanwhile.

The input is read twice, as a stream: once to survey it, once to be cut into shards for the workers (jobs/predict/).
What is done stays done: a driver that comes after a killed one goes on with the shards that are missing.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from jobs import hub_folder, lineage, notes, progress
from jobs.data import identity, sources
from jobs.data.compression import kind
from jobs.data.examples import Source
from jobs.data.tables import PLAIN, TableForm
from jobs.driver import storage, warm
from jobs.driver.job import Job, end_if_lost
from jobs.driver.standstill import ATTEMPT, Standstill
from jobs.predict import fold, parts, rows
from jobs.predict.columns import KeptColumns
from jobs.predict.crew import Crew
from jobs.predict.desk import Desk
from jobs.predict.parts import Done, Form
from jobs.predict.predictors import loaded_task, predicted_columns
from jobs.predict.rows import Survey, Tolerance
from jobs.predict.worker import Work
from jobs.spec import JobSpec
from jobs.spec_predict import GenerationSpec
from jobs.tasks import Task, get
from jobs.tasks.own_code import code_digest

NOTE = "predict.json"
"""What the run's output is decided by, in the run's folder."""
NAMES = {
    "input": "the input (data.predict), or a file that it names,",
    "weights": "the weights behind model.from",
    "learned": "the tokenizer, chat template, labels or generation_config.json behind model.from",
    "code": "the code of the task",
}
SHARD_ROWS = {True: 64, False: 1024}
"""Rows of a shard by whether the task generates, where the spec does not say."""
TELL_S = 10.0
"""So often MLflow gets the number of rows that are done."""


def predict_phase(job: Job) -> dict[str, Any]:
    """Predict for each row, and write the output with its manifest."""
    began = time.monotonic()
    output = output_of(job.spec, job.base, job.folder.path)
    done = Done(job.folder.path)
    if fold.check_free(output, job.folder.key):  # an attempt before this one came as far as this
        return _result(job, output, notes.read(fold.manifest_of(output)), done)
    storage.try_folder("predict.output", output.parent)
    task = loaded_task(get(job.spec.task.name)(job.spec.task.options), job.parent or "")
    generation = generation_of(job.spec, task)
    source = _open(job.spec, job.base)
    found, tolerance = _surveyed(job, task, source)
    _tell(job, source, found)
    for said in done.open():
        progress.say(said)
    before = sum(entry.rows for entry in done.entries.values())
    if before:
        progress.say(f"{before} of {found.rows} rows were done before")
    work = Work(job.spec, job.parent or "", job.precision, job.folder, _form(job.spec, found), generation)
    _work_off(job, source, task, found, done, work, tolerance)
    for said in tolerance.said(found.rows):
        progress.say(said)
    seconds = time.monotonic() - began
    about = {
        "run": job.folder.key,
        "model": {"from": job.parent_uri, "weights": lineage.weights_digest(job.parent)},
        "task": job.spec.task.name,
        "input": {"name": source.name, "files": source.digest, "rows": found.digest},
        "rows": found.rows,
        "seconds": seconds,
        "rows_per_second": (found.rows - before) / seconds,
    }
    return _result(job, output, _folded(job, output, done, work.form, about), done)


def _folded(job: Job, output: Path, done: Done, form: Form, about: dict[str, Any]) -> dict[str, Any]:
    """Put the parts together; return the manifest."""
    end_if_lost(job.folder)
    entries, throttle = done.in_order(), progress.Throttle(0.5)
    failed, counts = sum(len(entry.failed) for entry in entries), _added(entry.counts for entry in entries)

    def say(written: int) -> None:
        if written in (0, about["rows"]) or throttle.ready():
            progress.report("write", written, about["rows"])

    say(0)
    whole = {**about, "failed": failed, "counts": counts}
    return fold.fold(done.folder, entries, output, form.format, whole, form.prefix, say)


def output_of(spec: JobSpec, base: Path, run: Path) -> Path:
    """Return the file that the job writes.

    Args:
        base: where relative paths start.
        run: the run's folder.

    Raises:
        UserError: it is a URL, or a path within a folder that the cluster removes behind the job.
    """
    named = spec.predict.output
    if named is None:
        return run / f"predictions.{spec.predict.written_as}"
    if "://" in named:
        raise UserError(f"predict.output: {named!r} is a URL: give a path that every node can reach")
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


def decided_by(job: Job, found: Survey) -> dict[str, str]:
    """Return what decides the output of a run, in parts that can be named: part → digest."""
    task = get(job.spec.task.name)
    parent = job.parent or ""
    folder = Path(parent) if Path(parent).is_dir() else hub_folder.cached(str(parent))
    config = folder / "generation_config.json" if folder else None
    sampling = config.read_bytes() if task.generates and config is not None and config.is_file() else b""
    learned = identity.learned_digest(parent, task) + hashlib.sha256(sampling).hexdigest()
    code = f"{task.version} {code_digest(job.spec.task.name, beside=True) or ''}"
    return {"input": found.digest, "weights": lineage.weights_digest(job.parent), "learned": learned, "code": code}


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


def _open(spec: JobSpec, base: Path) -> Source:
    form = TableForm(spec.data.columns, spec.data.quotes)
    assert spec.data.predict is not None, "the spec was checked"
    source = sources.open_source(spec.data.predict, base, form)
    if form != PLAIN and not source.tables:
        key = "columns" if spec.data.columns else "quotes"
        raise UserError(f"data.{key} is for CSV and TSV files, and there is none: leave it out")
    return source


def _surveyed(job: Job, task: Task, source: Source) -> tuple[Survey, Tolerance]:
    """Read the input once; refuse what could not be written, and what is not as the run began."""
    spec = job.spec
    standstill = Standstill(job.folder.stacks(ATTEMPT, 0), spec.failures.hang_after_s)
    tolerance = Tolerance(spec.data.max_bad_rows if spec.data.bad_rows == "skip" else 0)
    known = _parquet_types(source) if spec.predict.written_as == "parquet" else {}
    columns = KeptColumns(spec.predict.written_as, spec.predict.columns, known)
    progress.report("read", 0, 1)
    with standstill.watched():
        found = rows.survey(source, task, columns, tolerance, _shard_rows(spec, task))
        columns.check(predicted_columns(task), spec.predict.prefix, spec.predict.where)
        standstill.beat()
        now, note = decided_by(job, found), job.folder.path / NOTE
        check_same(notes.read(note), now)
        notes.write(note, now)
    progress.report("read", 1, 1)
    return found, tolerance


def _tell(job: Job, source: Source, found: Survey) -> None:
    """Say what the input is, and what of it is not written."""
    progress.say(f"data {source.name}: {found.rows} rows in {found.shards} shards")
    left_out = found.columns.left_out
    told = (
        [f"columns that are not kept (predict.columns): {', '.join(map(repr, sorted(left_out)))}"] if left_out else []
    )
    told += lineage.said_of_code(job.spec.task.name, job.parent) + lineage.said_of_pages(job.parent)
    for said in (*source.notes, *told):
        progress.say(said)
    job.folder.add_remarks(told)
    job.track(lambda run: run.log_dataset(source.name, found.digest, "predict"))


def _form(spec: JobSpec, found: Survey) -> Form:
    wanted, columns = spec.predict, found.columns
    schema = columns.schema() if wanted.written_as == "parquet" else None
    return Form(wanted.written_as, wanted.prefix, wanted.where, wanted.columns, schema)


def _shard_rows(spec: JobSpec, task: Task) -> int:
    return spec.predict.shard_rows or SHARD_ROWS[task.generates]


def _parquet_types(source: Source) -> dict[str, Any]:
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


def _work_off(
    job: Job, source: Source, task: Task, found: Survey, done: Done, work: Work, tolerance: Tolerance
) -> None:
    """Have the shards done that are missing; note each, and tell how far the job is."""
    rows_done = sum(entry.rows for entry in done.entries.values())
    for entry in done.entries.values():
        _count(entry, tolerance)
    if len(done.entries) == found.shards:
        return
    missing = _missing(rows.shards(source, task, found, _shard_rows(job.spec, task)), done)
    desk = Desk(missing, job.spec.max_failures)
    size = min(job.spec.resources.most, found.shards - len(done.entries))
    crew = Crew(work, desk, size, warm.WORKER, progress.say)
    pace = _Pace(job, rows_done, found.rows)
    progress.report("start", 0, 1)
    for entry in crew.entries():
        _count(entry, tolerance)
        end_if_lost(job.folder)
        done.add(entry)
        pace.on(entry.rows)


def _missing(shards: Iterator[rows.Shard], done: Done) -> Iterator[rows.Shard]:
    for shard in shards:
        entry = done.entries.get(shard.number)
        if entry is None:
            yield shard
        elif (entry.first, entry.rows, entry.input) != (shard.first, len(shard.rows), shard.digest):
            raise RuntimeError(f"shard {shard.number} that was done before is of other rows")


def _count(entry: parts.Entry, tolerance: Tolerance) -> None:
    for number, row in entry.bad_rows().items():
        tolerance.add(number, row)


class _Pace:
    """Tells how far the job is: in its log, and every TELL_S in MLflow."""

    def __init__(self, job: Job, before: int, total: int) -> None:
        self._job, self._before, self._done, self._total = job, before, before, total
        self._began = time.monotonic()
        self._log, self._mlflow = progress.Throttle(0.5), progress.Throttle(TELL_S)

    def on(self, count: int) -> None:
        """Take note of rows that are done."""
        self._done += count
        seconds = max(time.monotonic() - self._began, 1e-6)
        rate = (self._done - self._before) / seconds
        if self._log.ready() or self._done == self._total:
            left_s = (self._total - self._done) / rate
            progress.report("predict", self._done, self._total, rows_per_second=rate, eta_s=left_s)
        if self._mlflow.ready():
            point, step = {"rows": float(self._done), "rows_per_second": rate}, self._done
            self._job.track(lambda run: run.log_metrics(point, step))


def _added(counts: Iterator[Mapping[str, int]]) -> dict[str, int]:
    found: dict[str, int] = {}
    for each in counts:
        for name, count in each.items():
            found[name] = found.get(name, 0) + count
    return found


def _result(job: Job, output: Path, made: Mapping[str, Any], done: Done) -> dict[str, Any]:
    """Tell the log and the run what was made; the parts are not needed any more."""
    total, failed = made["rows"], made["failed"]
    for name, count in made["counts"].items():
        progress.say(f"{count} of {total} rows: {name}")
    wrong = f", {failed} of them with an error instead of a prediction" if failed else ""
    progress.say(f"{total} rows in {output}{wrong} ({made['rows_per_second']:,.0f} rows/s)")
    figures = {"rows": float(total), "failed_rows": float(failed)}
    figures |= {name: float(made[name]) for name in ("seconds", "rows_per_second")}
    job.track(lambda run: run.log_metrics(figures, total))
    job.track(lambda run: run.set_tags({"tandem.bad_rows": str(failed), "tandem.model": str(job.parent_uri)}))
    whole = {key: value for key, value in made.items() if key != "shards"}
    job.track(lambda run: run.log_dict(whole, "predictions.json"))
    if done.folder.is_dir():
        done.clear()
    return {
        "output": str(output),
        "rows": total,
        "failed_rows": failed,
        "manifest": str(fold.manifest_of(output)),
        "model": job.parent_uri,
    }
