"""One attempt at a job: claim its folder, open its MLflow run, run its phase, end the run truthfully."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from cluster import home
from jobs import checkpoint, guard, phases, postmortem, preemption, progress, runs, warm
from jobs.phases import Job, Stopped
from jobs.spec import JobSpec
from jobs.store import Store
from tracking import outbox, registry
from tracking.errors import TrackingError
from tracking.outbox import Ending
from tracking.run import Run, Status
from tracking.spool import Record, SpoolSender

SPARES_WORTH_S = 300.0
"""A run that ends sooner would only be slowed down by starting processes for a failure that does not come."""


def run(spec: JobSpec, base: Path, placed: Mapping[str, int]) -> int:
    """Run `spec`, whose relative paths start at `base`, in this process and its worker group; return the exit code.

    Args:
        placed: how many workers each node takes, by node id.
    """
    storage = Path(spec.storage or home.home() / "storage").absolute()
    parent = find_parent(spec.model.source, base) if spec.model.source else None
    folder = runs.claim(storage, spec)
    folder.write_status("RUNNING")
    for name in (runs.STOP_FILE, runs.SAVE_FILE, "attempt.json", "failures.jsonl"):
        (folder.path / name).unlink(missing_ok=True)
    runs.write_note(folder.path, replace(runs.read_control(folder.path), excluded=()))
    guard.start(folder.path, folder.key)
    tags = _tags(spec)
    outbox.own(folder.path / "spool", Ending(folder.key, spec.name, "FAILED", spec.resolved(), tags))
    opened = partial(Run.open, folder.key, spec.name, params=spec.resolved(), tags=tags)
    sender = SpoolSender(folder.path / "spool", opened, interval_s=0.5)
    job = Job(spec, base, storage, folder, sender, parent, placed)
    progress.say(f"run {folder.key}{' goes on' if folder.resumed else ''} in {folder.path}")
    job.track(lambda run: progress.say(f"MLflow {run.url}"))
    job.track(lambda run: run.log_dict(spec.resolved(), "spec.yaml"))
    _on_stop(job)
    reporter = Reporter(job)
    sender.start(reporter.take)
    preemption.start(folder.path, progress.say)
    threading.Thread(target=reporter.watch_failures, name="tandem-failures", daemon=True).start()
    status: Status = "FAILED"
    try:
        outcome = phases.PHASES[spec.phase](job)
        status = "FINISHED"
    except Stopped:
        status = "KILLED"
        progress.say("stopped; submit the same spec again to go on")
        return 1
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        job.track(lambda run: run.set_tags({"tandem.error": reason}))
        job.track(lambda run: run.log_text(postmortem.page(folder.path, reason), "post-mortem.md"))
        raise
    finally:
        _end(job, Ending(folder.key, spec.name, status, spec.resolved(), tags))
    progress.result({"run": folder.key, **_run_address(sender), **outcome})
    return 0


def _end(job: Job, ending: Ending) -> None:
    """Send what is left and close the run. A tracking server that is down changes nothing about the job's result."""
    job.folder.write_status(ending.status)
    spool = job.folder.path / "spool"
    outbox.note(spool, ending)
    left = job.sender.stop(drain_timeout_s=30)
    try:
        if left or job.sender.run is None:
            raise TrackingError(job.sender.last_error or "the server did not answer in time")
        job.sender.run.end(ending.status)
        outbox.forget(spool)
    except TrackingError as error:
        progress.say(
            f"MLflow does not know everything yet ({error}); later: tandem tracking sync {spool.parent.parent}"
        )


def _run_address(sender: SpoolSender) -> dict[str, str]:
    return {"run_id": sender.run.run_id, "run_url": sender.run.url} if sender.run else {}


def find_parent(source: str, base: Path) -> Path | str:
    """Return the directory behind `model.from`: a registry URI or a path; anything else is taken for a hub id."""
    if source.startswith("models:/"):
        return registry.resolve(source)
    if (base / source).exists() or source.startswith(("/", ".")):
        return registry.resolve(str(base / source))
    return source


def _tags(spec: JobSpec) -> dict[str, str]:
    try:
        version = metadata.version("tandem-ray")
    except metadata.PackageNotFoundError:
        version = "source"
    tags = {"tandem.phase": spec.phase, "tandem.task": spec.task, "tandem.spec_digest": spec.digest()}
    tags["tandem.code_version"] = os.environ.get("TANDEM_CODE_VERSION", version)
    return tags


def _on_stop(job: Job) -> None:
    """On SIGTERM (what `ray job stop` sends) ask the workers for a checkpoint and an end; other phases end at once."""

    def stop(signum: int, frame: Any) -> None:
        job.stopping = True
        if job.spec.training is None:
            raise Stopped
        (job.folder.path / runs.STOP_FILE).touch()
        progress.say("asked to stop: a checkpoint is written first")

    signal.signal(signal.SIGTERM, stop)


class Reporter:
    """Turn spooled records into progress lines and MLflow's logged models; called in the sender's thread."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._throttle = progress.Throttle(0.5)
        self._held_out: dict[str, float] = {}
        self._checkpoints: set[int] = set()
        self._spares_for: str | None = None
        self._store = Store(phases.checkpoints_of(job))

    def take(self, records: list[Record]) -> None:
        """Show and pass on new records."""
        steps = self._job.steps
        for record in records:
            measured = {k: v for k, v in record.metrics.items() if k.startswith("eval_")}
            if measured:
                self._held_out.update(measured)
                progress.report("evaluate", record.step, max(steps, record.step), **measured)
            if "checkpoint_s" in record.metrics:
                self._log_checkpoint(record)
        trained = [record for record in records if "loss" in record.metrics]
        if trained:
            self._keep_spares(trained[-1])
        if trained and (self._throttle.ready() or trained[-1].step == steps):
            _report_step(trained[-1], steps)

    def _keep_spares(self, record: Record) -> None:
        """Once a group trains, and for a while yet, have the processes of the next one started."""
        left_s = (self._job.steps - record.step) * record.metrics["step_time_s"]
        if left_s > SPARES_WORTH_S and self._spares_for != self._attempt():
            self._spares_for = self._attempt()
            warm.start(self._job.placed, spare=True)

    def _attempt(self) -> str | None:
        attempt = runs.read_attempt(self._job.folder.path)
        return attempt.name if attempt else None

    def watch_failures(self) -> None:
        """Say what failed and what was decided, and keep the post-mortem page of the MLflow run up to date."""
        told, folder = 0, self._job.folder.path
        while True:
            found = postmortem.failures(folder)
            for entry in found[told:]:
                who = f" on rank {entry['rank']}" if entry["rank"] is not None else ""
                progress.say(f"{entry['kind']}{who} after step {entry['step']} → {entry['action']}: {entry['reason']}")
            if len(found) > told:
                page = postmortem.page(folder)
                self._job.track(lambda run, page=page: run.log_text(page, "post-mortem.md"))  # type: ignore[misc]
                count = len(found)
                self._job.track(lambda run, n=count: run.set_tags({"tandem.failures": str(n)}))  # type: ignore[misc]
            told = len(found)
            time.sleep(0.5)

    def _log_checkpoint(self, record: Record) -> None:
        """Show the checkpoint in MLflow, with the last evaluation before it, and take off those that are gone.

        MLflow keeps a logged model's metrics in the run's history too: keys of their own keep the two apart.
        """
        name = f"{self._job.spec.name}-step-{record.step}"
        directory = self._store.locate(checkpoint.folder(record.step))
        metrics = {f"checkpoint_{key.removeprefix('eval_')}": value for key, value in self._held_out.items()}
        present = set(checkpoint.steps(self._store))
        if record.step in present:  # else it was removed before its record came here
            self._job.track(lambda run: run.log_checkpoint(name, directory, record.step, metrics))
        for step in self._checkpoints - present:
            self._job.track(lambda run, step=step: run.drop_checkpoint(step))  # type: ignore[misc]
        self._checkpoints = (self._checkpoints | {record.step}) & present


def _report_step(record: Record, steps: int) -> None:
    rates = {k: v for k, v in record.metrics.items() if k.endswith("_per_second")}
    left = (steps - record.step) * record.metrics["step_time_s"]
    progress.report("train", record.step, max(steps, record.step), loss=record.metrics["loss"], **rates, eta_s=left)
