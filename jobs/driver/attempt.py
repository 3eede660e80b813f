"""One attempt at a job: claim its folder, open its MLflow run, run its phase, end the run truthfully."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from cluster import home
from jobs import parents, progress, run_folder
from jobs.driver import guard, phases, postmortem, precision, preemption
from jobs.driver.job import Job, Stopped
from jobs.driver.reporter import FailureWatch, Reporter
from jobs.spec import JobSpec
from tracking import outbox
from tracking.errors import TrackingError
from tracking.outbox import Ending
from tracking.run import Run, Status
from tracking.spool import SpoolSender


def run_job(spec: JobSpec, base: Path, placed: Mapping[str, int]) -> int:
    """Run `spec`, whose relative paths start at `base`, in this process and its worker group; return the exit code.

    Args:
        placed: how many workers each node takes, by node id.
    """
    storage = base / Path(spec.storage).expanduser() if spec.storage else (home.home() / "storage").absolute()
    parent = parents.find(spec, base)
    folder = run_folder.claim(storage, spec)
    folder.begin()
    guard.start(folder)
    tags = _tags(spec)
    decision = precision.settle(spec, folder, placed)
    params = precision.in_params(spec, decision)
    outbox.own(folder.spool, Ending(folder.key, spec.name, "FAILED", params, tags))
    opened = partial(Run.open, folder.key, spec.name, params=params, tags=tags)
    sender = SpoolSender(folder.spool, opened, interval_s=0.5)
    job = Job(spec, base, storage, folder, sender, parent, placed, decision.precision)
    progress.say(f"run {folder.key}{' goes on' if folder.resumed else ''} in {folder.path}")
    job.track(lambda run: progress.say(f"MLflow {run.url}"))
    job.track(lambda run: run.log_dict(spec.resolved(), "spec.yaml"))
    _on_stop(job)
    sender.start(Reporter(job).take)
    preemption.start(folder, progress.say)
    watch = FailureWatch(folder, job.track)
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
        job.track(lambda run: run.log_text(postmortem.page(folder, reason), "post-mortem.md"))
        raise
    finally:
        watch.finish()
        _end(job, Ending(folder.key, spec.name, status, params, tags))
    progress.result({"run": folder.key, **_run_address(sender), **outcome})
    return 0


def _end(job: Job, ending: Ending) -> None:
    """Send what is left and close the run. A tracking server that is down changes nothing about the job's result."""
    job.folder.write_status(ending.status)
    spool = job.folder.spool
    outbox.note(spool, ending)
    left = job.sender.stop(drain_timeout_s=30)
    try:
        if job.sender.run is None or (left and job.sender.last_error):
            raise TrackingError(job.sender.last_error or "the server did not answer in time")
        job.sender.run.end(ending.status)
        if left:
            raise TrackingError(f"{left} records are still on the disk")
        registered = outbox.publish(spool, job.sender.run.run_id)
        if registered:
            progress.say(f"registered {registered}, now that MLflow answers")
        outbox.forget(spool)
    except TrackingError as error:
        progress.say(
            f"MLflow does not know everything yet ({error}); later: tandem tracking sync {spool.parent.parent}"
        )


def _run_address(sender: SpoolSender) -> dict[str, str]:
    return {"run_id": sender.run.run_id, "run_url": sender.run.url} if sender.run else {}


def _tags(spec: JobSpec) -> dict[str, str]:
    try:
        version = metadata.version("tandem-ray")
    except metadata.PackageNotFoundError:
        version = "source"
    tags = {"tandem.phase": spec.phase, "tandem.task": spec.task.name, "tandem.spec_digest": spec.digest()}
    tags["tandem.code_version"] = os.environ.get("TANDEM_CODE_VERSION", version)
    return tags


def _on_stop(job: Job) -> None:
    """On SIGTERM (what `ray job stop` sends) ask the workers for a checkpoint and an end; other phases end at once."""

    def stop(signum: int, frame: Any) -> None:
        job.stopping = True
        if job.spec.training is None:
            raise Stopped
        job.folder.request_stop()
        progress.say("asked to stop: a checkpoint is written first")

    signal.signal(signal.SIGTERM, stop)
