"""Phase `predict`: a model over all rows of `data.predict`, each of them once, in order, whatever fails meanwhile.

The input is read twice, as a stream: once to survey it, once to be cut into shards for the workers (jobs/predict/).
What is done stays done: a driver that comes after a killed one goes on with the shards that are missing.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster import stores
from jobs import lineage, notes, progress, spec_unused
from jobs.data import opening, sources, tables, unchanged
from jobs.data.examples import Source
from jobs.data.prepare import DIGESTS
from jobs.data.tables import TableForm
from jobs.driver import storage, warm
from jobs.driver.job import Job, end_if_lost
from jobs.driver.standstill import ATTEMPT, Standstill
from jobs.predict import fold, parts, places, rows, terms
from jobs.predict.columns import KeptColumns
from jobs.predict.crew import Crew
from jobs.predict.desk import Desk
from jobs.predict.parts import Done, Form
from jobs.predict.places import Place
from jobs.predict.predictors import loaded_task, predicted_columns
from jobs.predict.rows import Survey, Tolerance
from jobs.predict.worker import Work
from jobs.spec import JobSpec
from jobs.tasks import Task, get

NOTE = "predict.json"
"""What the run's output is decided by, in the run's folder."""
TELL_S = 10.0
"""So often MLflow gets the number of rows that are done."""


def predict_phase(job: Job) -> dict[str, Any]:
    """Predict for each row, and write the output with its manifest."""
    began = time.monotonic()
    stored = job.stored.run if job.stored else None
    output = terms.output_of(job.spec, job.base, stored or job.folder.path)
    done = Done(job.folder.path, stores.joined(stored, parts.STORED) if stored else None)
    if fold.check_free(output, job.folder.key):  # an attempt before this one came as far as this
        return _result(job, output, places.note(fold.manifest_of(output)), done)
    _try(job, output)
    task = loaded_task(get(job.spec.task.name)(job.spec.task.options), job.parent or "")
    generation = terms.generation_of(job.spec, task)
    told = lambda phase, done, total, counts: progress.report(phase, done, total, **counts)  # noqa: E731
    with unchanged.kept_in(job.storage / DIGESTS), opening.told(told):
        source = _open(job.spec, job.base)
    found, tolerance = _surveyed(job, task, source)
    _tell(job, source, found)
    for said in done.open():
        progress.say(said)
    before = sum(entry.rows for entry in done.entries.values())
    if before:
        progress.say(f"{before} of {found.rows} rows were done before")
    job.check_nodes()
    work = Work(job.spec, job.parent or "", job.precision, job.folder, _form(job.spec, found), generation, done.files)
    with job.on_nodes(None) as token:
        _work_off(job, source, task, found, done, replace(work, token=token), tolerance)
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


def _try(job: Job, output: Place) -> None:
    """Write where the output will be; say where only this node has it."""
    folder = places.folder_of(output)
    if isinstance(folder, Path):
        storage.try_folder("predict.output", folder)
        if job.stored:
            progress.say(f"predict.output: {output} is written on this job's driver's node, {socket.gethostname()}")
    else:
        storage.try_uri("predict.output", folder)


def _folded(job: Job, output: Place, done: Done, form: Form, about: dict[str, Any]) -> dict[str, Any]:
    """Put the parts together; return the manifest."""
    end_if_lost(job.folder)
    entries, throttle = done.in_order(), progress.Throttle(0.5)
    failed, counts = sum(len(entry.failed) for entry in entries), _added(entry.counts for entry in entries)

    def say(written: int) -> None:
        if written in (0, about["rows"]) or throttle.ready():
            progress.report("write", written, about["rows"])

    say(0)
    whole = {**about, "failed": failed, "counts": counts}
    return fold.fold(done.files, entries, output, form.format, whole, form.prefix, say)


def _open(spec: JobSpec, base: Path) -> Source:
    form = TableForm(spec.data.columns, spec.data.quotes)
    assert spec.data.predict is not None, "the spec was checked"
    source = sources.open_source(spec.data.predict, base, form)
    tables.check_used(form, source.tables)
    return source


def _surveyed(job: Job, task: Task, source: Source) -> tuple[Survey, Tolerance]:
    """Read the input once; refuse what could not be written, and what is not as the run began."""
    spec = job.spec
    standstill = Standstill(job.folder.stacks(ATTEMPT, 0), spec.failures.hang_after_s)
    tolerance = Tolerance(spec.data.max_bad_rows if spec.data.bad_rows == "skip" else 0)
    known = terms.known_types(source) if spec.predict.written_as == "parquet" else {}
    columns = KeptColumns(spec.predict.written_as, spec.predict.columns, known)
    progress.report("read", 0, 1)
    with standstill.watched():
        found = rows.survey(source, task, columns, tolerance, terms.shard_rows(spec, task))
        columns.check(predicted_columns(task), spec.predict.prefix, spec.predict.where)
        standstill.beat()
        now, note = terms.decided_by(spec, job.parent or "", found), job.folder.path / NOTE
        terms.check_same(notes.read(note), now)
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
    for said in [*spec_unused.unused(job.spec), *source.notes]:
        progress.say(said)
    job.folder.add_remarks(told)  # which says them, too
    job.track(lambda run: run.log_dataset(source.name, found.digest, "predict"))


def _form(spec: JobSpec, found: Survey) -> Form:
    wanted, columns = spec.predict, found.columns
    schema = columns.schema() if wanted.written_as == "parquet" else None
    return Form(wanted.written_as, wanted.prefix, wanted.where, wanted.columns, schema)


def _work_off(
    job: Job, source: Source, task: Task, found: Survey, done: Done, work: Work, tolerance: Tolerance
) -> None:
    """Have the shards done that are missing; note each, and tell how far the job is."""
    rows_done = sum(entry.rows for entry in done.entries.values())
    for entry in done.entries.values():
        _count(entry, tolerance)
    if len(done.entries) == found.shards:
        return
    missing = _missing(rows.shards(source, task, found, terms.shard_rows(job.spec, task)), done)
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
    """Tells how far the job is: in its log, and every TELL_S in MLflow. The first shard's end begins the time."""

    def __init__(self, job: Job, before: int, total: int) -> None:
        self._job, self._done, self._total = job, before, total
        self._first: tuple[float, int] | None = None
        self._log, self._mlflow = progress.Throttle(0.5), progress.Throttle(TELL_S)

    def on(self, count: int) -> None:
        """Take note of rows that are done."""
        self._done += count
        now = time.monotonic()
        if self._first is None:
            self._first = now, self._done
            progress.report("predict", self._done, self._total)
            return
        rate = (self._done - self._first[1]) / max(now - self._first[0], 1e-6)
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


def _result(job: Job, output: Place, made: Mapping[str, Any], done: Done) -> dict[str, Any]:
    """Tell the log and the run what was made; the parts are not needed any more."""
    total, failed = made["rows"], made["failed"]
    for name, count in made["counts"].items():
        progress.say(f"{count} of {total} rows: {name}")
    wrong = f", {failed} of them with an error instead of a prediction" if failed else ""
    progress.say(f"{total} rows in {places.shown(output)}{wrong} ({made['rows_per_second']:,.0f} rows/s)")
    figures = {"rows": float(total), "failed_rows": float(failed)}
    figures |= {name: float(made[name]) for name in ("seconds", "rows_per_second")}
    job.track(lambda run: run.log_metrics(figures, total))
    job.track(lambda run: run.set_tags({"tandem.bad_rows": str(failed), "tandem.model": str(job.parent_uri)}))
    whole = {key: value for key, value in made.items() if key != "shards"}
    job.track(lambda run: run.log_dict(whole, "predictions.json"))
    done.clear()
    return {
        "output": places.shown(output),
        "rows": total,
        "failed_rows": failed,
        "manifest": places.shown(fold.manifest_of(output)),
        "model": job.parent_uri,
    }
