"""The driver of a job, inside the cluster: prepare → worker group → evaluate → register.

    python -m jobs.driver SPEC [--set key.path=value …]

This is the entry point of a Ray job, whether `tandem jobs submit` or plain `ray job submit` sends it. It exits 0 when
the job finished, 1 when it failed, 2 when the spec or the data is wrong; the MLflow run ends the same way.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from cluster import connect, home, placement, specfile, topology
from cluster.errors import UserError
from jobs import checkpoint, noise, phases, progress, runs, train
from jobs.phases import Job, Stopped
from jobs.spec import JobSpec
from tracking import registry
from tracking.errors import TrackingError
from tracking.run import Run, Status
from tracking.spool import Record, SpoolSender


def main(arguments: list[str] | None = None) -> int:
    """Run the job a spec describes; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.driver", description="Run one Tandem job on this Ray cluster."
    )
    parser.add_argument("spec", type=Path, help="the job's YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE", dest="overrides")
    options = parser.parse_args(arguments)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    noise.quiet()
    try:
        spec = specfile.load(options.spec, JobSpec, options.overrides)
        base = Path(os.environ.get("TANDEM_SPEC_FOLDER") or options.spec.parent).absolute()
        return run(spec, base)
    except Exception as error:
        if not isinstance(getattr(error, "exit_code", None), int):
            raise
        progress.say(f"error: {error}")
        return int(error.exit_code)  # type: ignore[attr-defined]


def run(spec: JobSpec, base: Path) -> int:
    """Run `spec`, whose relative paths start at `base`, in this process and its worker group."""
    # Ray Train's own actors look for the cluster by themselves, and find two where two run on one machine.
    address = {name: os.environ[name] for name in ("RAY_ADDRESS",) if name in os.environ}
    connect.init_ray(log_to_driver=True, runtime_env={"env_vars": address})
    check_it_fits(spec)
    storage = Path(spec.storage or home.home() / "storage").absolute()
    parent = find_parent(spec.model.source, base) if spec.model.source else None
    folder = runs.claim(storage, spec)
    folder.write_status("RUNNING")
    (folder.path / train.STOP_FILE).unlink(missing_ok=True)
    mlflow_run = Run.open(folder.key, spec.name, params=spec.resolved(), tags=_tags(spec))
    job = Job(spec, base, storage, folder, mlflow_run, parent)
    progress.say(f"run {folder.key}{' goes on' if folder.resumed else ''}; MLflow {mlflow_run.url}")
    _on_stop(job)
    reporter = Reporter(job)
    sender = SpoolSender(folder.path / "spool", mlflow_run, interval_s=0.5, on_records=reporter.take)
    reporter.defer = sender.defer
    sender.start()
    sender.defer(lambda run: run.log_dict(spec.resolved(), "spec.yaml"))
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
        sender.defer(lambda run: run.set_tags({"tandem.error": reason}))
        raise
    finally:
        _end(job, sender, status)
    progress.result({"run_id": mlflow_run.run_id, "run_url": mlflow_run.url, **outcome})
    return 0


def _end(job: Job, sender: SpoolSender, status: Status) -> None:
    """Send what is left and close the run. A tracking server that is down changes nothing about the job's result."""
    job.folder.write_status(status)
    left = sender.stop(drain_timeout_s=30)
    if left:
        progress.say(f"{left} records could not be sent to MLflow and stay in {job.folder.path / 'spool'}")
    try:
        job.run.end(status)
    except TrackingError as error:
        progress.say(f"the MLflow run could not be ended as {status}: {error}")


def check_it_fits(spec: JobSpec) -> None:
    """Refuse a worker group that the cluster can never hold; say what it waits for if others hold the CPUs now.

    Raises:
        UserError: it cannot fit; Ray Train itself would wait for ever without a word.
    """
    wanted = spec.resources
    request = placement.Request(wanted.workers, wanted.cpus_per_worker, wanted.gpus_per_worker)
    answer = placement.fit(request, topology.nodes())
    if isinstance(answer, placement.Refusal):
        if not answer.fits_when_free:
            raise UserError(f"resources: {answer.reason}; {answer.what_would_help}")
        progress.say(f"waiting: {answer.reason}; {answer.what_would_help}")


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
        if job.spec.phase in ("evaluate", "quantize"):
            raise Stopped
        (job.folder.path / "STOP").touch()
        progress.say("asked to stop: a checkpoint is written first")

    signal.signal(signal.SIGTERM, stop)


class Reporter:
    """Turn spooled records into progress lines and MLflow's logged models; called in the sender's thread."""

    def __init__(self, job: Job) -> None:
        self.defer: Callable[[Callable[[Run], object]], None] = lambda call: None
        self._job = job
        self._throttle = progress.Throttle(0.5)
        self._held_out: dict[str, float] = {}
        self._checkpoints: dict[int, Path] = {}

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
        if trained and (self._throttle.ready() or trained[-1].step == steps):
            _report_step(trained[-1], steps)

    def _log_checkpoint(self, record: Record) -> None:
        """Show the checkpoint in MLflow, with the last evaluation before it, and take off those that are gone.

        MLflow keeps a logged model's metrics in the run's history too: keys of their own keep the two apart.
        """
        name = f"{self._job.spec.name}-step-{record.step}"
        directory = checkpoint.folder(self._job.folder.path / "checkpoints", record.step)
        metrics = {f"checkpoint_{key.removeprefix('eval_')}": value for key, value in self._held_out.items()}
        self.defer(lambda run: run.log_checkpoint(name, directory, record.step, metrics))
        for step in [step for step, path in self._checkpoints.items() if not path.is_dir()]:
            del self._checkpoints[step]
            self.defer(lambda run, step=step: run.drop_checkpoint(step))  # type: ignore[misc]
        self._checkpoints[record.step] = directory


def _report_step(record: Record, steps: int) -> None:
    rates = {k: v for k, v in record.metrics.items() if k.endswith("_per_second")}
    left = (steps - record.step) * record.metrics["step_time_s"]
    progress.report("train", record.step, max(steps, record.step), loss=record.metrics["loss"], **rates, eta_s=left)


if __name__ == "__main__":
    sys.exit(main())
