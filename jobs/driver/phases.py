"""What a job's driver does in each phase. Every phase returns what it made, for the job's result line."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cluster import connect
from cluster.errors import UserError
from jobs import first_look, lineage, profiled, progress
from jobs.data import prepare
from jobs.data.identity import Noted
from jobs.data.preparation import trains
from jobs.data.prepare import Prepared
from jobs.driver import figures, mixing, profile, publish, reference, shares, storage, swap_build, zero_stage
from jobs.driver.early import Early
from jobs.driver.job import Job, end_if_lost
from jobs.driver.predict import predict_phase
from jobs.driver.standstill import ATTEMPT, Standstill
from jobs.driver.stopping import Stopped
from jobs.driver.sweep.phase import sweep_phase
from jobs.tasks import get
from jobs.worker import loop, setup, zero
from jobs.worker.config import WorkerConfig
from jobs.worker.profile import profile_worker


def train_phase(job: Job) -> dict[str, Any]:
    """Pre-train or fine-tune, then write the model contract and register the version."""
    first_look.check_reference(job.spec, get(job.spec.task.name)(job.spec.task.options))
    early = Early(job) if job.spec.data.start_early else None
    prepared = _prepare(job, early)
    assert job.spec.training is not None
    zero.read_named(job.spec.training, job.base)
    job.steps = setup.total_steps(job.spec.training, prepared.train_rows)
    if wrong := job.spec.training.too_long_for(job.steps):
        raise UserError(f"training: {wrong}, which is what {prepared.train_rows} rows come to")
    if prepared.is_whole:
        _say_passes(job, prepared)
    zero_stage.settle(job, prepared)
    swap_build.build(job.spec)
    progress.report("start", 0, 1)
    with early.beside() if early else nullcontext():
        run_workers(job, loop.train_worker, prepared)
    end_if_lost(job.folder)
    evaluations = job.folder.evaluations()
    if evaluations is None:
        if early:
            early.leave()
        raise Stopped
    if early and not prepared.is_whole:
        prepared = _told(job, early.whole())
        _say_passes(job, prepared)
    progress.say(figures.trained(evaluations))
    task = prepared.task(job.spec)
    job.folder.add_remarks(task.verdict(evaluations.get("final", {})))
    publish.log_figures(job, task, job.folder.sums())
    return publish.publish(job, prepared, evaluations.get("final", {})) | {"evaluations": evaluations}


def _say_passes(job: Job, prepared: Prepared) -> None:
    """Say how often the run sees its rows, where that may surprise; of a mixture, what it takes from each source.

    Raises:
        UserError: it would see a source more often than that allows.
    """
    assert job.spec.training is not None
    if not prepared.mixture:
        said = figures.passes(job.spec.training, job.steps, prepared.train_rows)
    elif wrong := mixing.too_often(job.spec, prepared, job.steps):
        raise UserError(wrong)
    else:
        said = mixing.said(job.spec, prepared, job.steps)
        asked = mixing.params(job.spec, prepared, job.steps)
        job.track(lambda run: run.log_params(asked))
    for sentence in said:
        progress.say(sentence)


def profile_phase(job: Job) -> dict[str, Any]:
    """Run a training job's first steps under torch's profiler; leave each rank's trace and table, and no model."""
    if job.spec.data.start_early:
        progress.say("data.start_early: a profile prepares all data first, and visits rows in the order of other runs")
    prepared = _prepare(job)
    assert job.spec.training is not None
    zero.read_named(job.spec.training, job.base)
    job.steps = profiled.last_step(job.profile)
    profiled.check_length(job.profile, setup.total_steps(job.spec.training, prepared.train_rows))
    zero_stage.settle(job, prepared)
    swap_build.build(job.spec)
    progress.report("start", 0, 1)
    run_workers(job, profile_worker, prepared)
    end_if_lost(job.folder)
    return profile.published(job)


def evaluate_phase(job: Job) -> dict[str, Any]:
    """Measure a model on held-out data. Shares need no collective, so plain tasks do it, one for each worker."""

    from jobs.worker import by_source
    from jobs.worker.evaluate import check_finite, evaluate_share, joined

    prepared = _prepare(job)
    workers = shares.workers(job.spec.resources, job.placed)
    progress.report("measure", 0, workers)
    arguments = (job.spec, str(job.parent), prepared, job.precision)
    parts: list[dict[str, Any]] = []
    with job.on_nodes(prepared) as token:
        begun = [shares.begin(job, token, rank, evaluate_share, *arguments, rank, workers) for rank in range(workers)]
        for done, share in enumerate(begun, 1):
            parts.append(shares.result(job, share))
            progress.report("measure", done, workers)
    totals = joined(parts)
    task = prepared.task(job.spec)
    metrics = by_source.summarised(task, totals)
    progress.say(figures.evaluated(metrics))
    check_finite(metrics["loss"], f"{job.spec.model.source} on the held-out rows")
    job.folder.add_remarks(task.verdict(metrics))
    publish.log_figures(job, task, by_source.of_all(totals))
    job.track(lambda run: run.log_metrics({f"eval_{key}": value for key, value in metrics.items()}))
    return {"evaluation": metrics, "model": job.spec.model.source}


def quantize_phase(job: Job) -> dict[str, Any]:
    """Shrink the weights, measure what it cost, and register the child version."""
    from jobs.worker.quantize import quantize

    prepared = _prepare(job)
    progress.report("quantize", 0, 1)
    arguments = (job.spec, str(job.parent), prepared, job.precision, str(job.folder.model))
    with job.on_nodes(prepared) as token:
        report = shares.result(job, shares.begin(job, token, 0, quantize, *arguments))
    progress.report("quantize", 1, 1)
    progress.say(figures.quantised(report))
    job.track(lambda run: run.log_metrics({k: v for k, v in report.items() if isinstance(v, float)}))
    evaluation = {k.removeprefix("eval_"): v for k, v in report.items() if k.startswith("eval_")}
    published = publish.publish(job, prepared, evaluation, {"method": job.spec.quantize.method, **report})
    return published | {"quantization": report}


PHASES: dict[str, Callable[[Job], dict[str, Any]]] = {
    "pretrain": train_phase,
    "finetune": train_phase,
    "evaluate": evaluate_phase,
    "quantize": quantize_phase,
    "predict": predict_phase,
    "sweep": sweep_phase,
}


def run_workers(job: Job, function: Callable[[WorkerConfig], None], prepared: Prepared) -> None:
    """Run `function` on every worker of a Ray Train group; a lost group is started again from its checkpoint.

    Raises:
        Stopped: it was asked to.
        RuntimeError: the group failed more often than `max_failures`; the message holds the worker's own error.
    """
    from ray.train import TrainingFailedError

    from jobs.driver import ray_train

    name = f"{job.folder.key}-{os.getpid()}"
    try:
        with job.on_nodes(prepared) as token:
            config, ray_state = _for_workers(job, prepared, token), job.stored.ray_state if job.stored else None
            autoscaling = not connect.connection().is_local
            ray_train.run_group(function, config, name=name, autoscaling=autoscaling, state=ray_state)
    except TrainingFailedError as error:
        if job.stop.asked:
            raise Stopped from error
        raise _cause(error) from error


def _for_workers(job: Job, prepared: Prepared, token: str) -> WorkerConfig:
    return WorkerConfig(
        job.stored.told_to_workers(job.spec) if job.stored else job.spec,
        job.precision,
        prepared,
        job.folder,
        job.checkpoints,
        Path(job.parent) if job.parent else None,
        job.base,
        job.storage,
        token,
        job.stored.uri if job.stored else "",
        job.profile,
    )


def _cause(error: Exception) -> Exception:
    """Return a user's error that a worker raised as it is; else one that shows the workers' errors."""
    failures = getattr(error, "worker_failures", {}) or {}
    for failure in failures.values():
        inner = getattr(failure, "cause", None) or failure
        if isinstance(inner, UserError) or storage.has_failed(inner):
            return inner
    return RuntimeError(str(error))


def _data_before(job: Job) -> Noted | None:
    """Return what the run that goes on has noted about its data; None where anything may come."""
    if not trains(job.spec):
        return None
    before = job.folder.data()
    behind = job.folder.last_step()
    if before is None and behind:
        progress.say("the run began before Tandem noted what its data is: whether that has changed is not known")
    return before if behind else None


def _prepare(job: Job, early: Early | None = None) -> Prepared:
    """Return the data of the job, and say what is to be said of it; what is not there yet is left to `early`."""
    throttle = progress.Throttle(0.5)
    standstill = Standstill(job.folder.stacks(ATTEMPT, 0), job.spec.failures.hang_after_s)

    def on_progress(phase: str, done: int, total: int, counts: Mapping[str, float]) -> None:
        standstill.beat()
        if early:
            early.beat()
        if done in (0, total) or throttle.ready():
            progress.report(phase, done, total, **counts)

    trained = trains(job.spec)
    with standstill.watched():
        before, weights = _data_before(job), lineage.weights_digest(job.parent) if trained else ""
        if before is not None:
            lineage.check_same(before.weights, weights, job.parent_uri)
        for said in lineage.said_of_pages(job.parent) if trained else ():
            progress.say(said)
        job.folder.add_remarks(lineage.said_of_code(job.spec.task.name, job.parent) if not trained else [])
        fetch = job.stored.fetch if job.stored else None
        stages = prepare.stages(
            job.spec,
            job.base,
            job.storage,
            parent=job.parent,
            on_progress=on_progress,
            before=before,
            overlap=early,
            fetch=fetch,
            uri=job.stored.uri if job.stored else None,
        )
        prepared = early.begin(stages) if early else next(stages)
        if job.stored and prepared.is_whole:
            job.stored.push(prepared)
    job.check_nodes()
    prepared = reference.added(job, prepared)
    if before is None:
        job.folder.keep_data(Noted(prepared.parts, prepared.rows, weights))
    if not prepared.is_whole:
        progress.say(f"data {prepared.name}: {prepared.eval_rows} rows held out; training begins as others are encoded")
        return prepared
    return _told(job, prepared)


def _told(job: Job, prepared: Prepared) -> Prepared:
    """Say what is to be said of the data once all of it is there, and have the run told; return it.

    Raises:
        UserError: nothing is held out for a phase that measures.
    """
    noted = job.folder.data()
    if noted is not None and not noted.rows:  # it began before all was there
        job.folder.keep_data(replace(noted, rows=prepared.rows))
    counted = f"{prepared.train_rows} rows to train on, {prepared.eval_rows} held out"
    progress.say(f"data {prepared.name}: {counted}{' (encoded before)' if prepared.cached else ''}")
    for note in prepared.notes:
        progress.say(note)
    if prepared.bad_rows:
        progress.say(f"{prepared.bad_rows} bad rows left out; the first: {prepared.first_bad[0]}")
        for reason in prepared.bad_reasons:
            progress.say(reason)
    limit = job.spec.data.eval_max_rows
    if limit and limit < prepared.eval_rows:
        drawn = f"{limit} of {prepared.eval_rows} held-out rows, drawn by data.split_seed {job.spec.data.split_seed}"
        progress.say(f"evaluations measure {drawn} (data.eval_max_rows)")
    for sentence in mixing.measured(job.spec, prepared):
        progress.say(sentence)
    job.track(lambda run: run.log_dataset(prepared.name, prepared.digest))
    job.track(lambda run: run.set_tags({"tandem.bad_rows": str(prepared.bad_rows)}))
    job.track(lambda run: run.log_dict(asdict(replace(prepared, arriving=None)), "data.json"))
    if job.spec.phase in ("evaluate", "quantize") and not prepared.eval_rows:
        raise UserError(f"phase {job.spec.phase} needs held-out rows: give data.eval, or data.eval_fraction above 0")
    return prepared
