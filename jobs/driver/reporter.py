"""What a job's driver tells while the workers train: progress lines, MLflow's logged models, failures.

Records come from the spool, in the sender's thread; failures from what the failure policy
(jobs/driver/ray_train.py) notes in the run's folder.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from jobs import progress
from jobs.checkpoint import catalog
from jobs.checkpoint.store import Store
from jobs.driver import planned, postmortem, warm
from jobs.driver.job import Job
from jobs.notes import DamagedNote
from jobs.plan.outlook import Outlook
from jobs.run_folder import RunFolder
from tracking.run import Run
from tracking.spool import Record

SPARES_WORTH_S = 300.0
"""A run that ends sooner would only be slowed down by starting processes for a failure that does not come."""


class Reporter:
    """Turn spooled records into progress lines and MLflow's logged models; called in the sender's thread."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._throttle = progress.Throttle(0.5)
        self._held_out: dict[str, float] = {}
        self._checkpoints: set[int] = set()
        self._spares_for: str | None = None
        self._store = Store(job.checkpoints)

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
        attempt = self._job.folder.attempt()
        return attempt.name if attempt else None

    def _log_checkpoint(self, record: Record) -> None:
        """Show the checkpoint in MLflow, with the last evaluation before it, and take off those that are gone.

        MLflow keeps a logged model's metrics in the run's history too: keys of their own keep the two apart.
        """
        name = f"{self._job.spec.name}-step-{record.step}"
        directory = self._store.locate(catalog.folder(record.step))
        metrics = {f"checkpoint_{key.removeprefix('eval_')}": value for key, value in self._held_out.items()}
        present = set(catalog.steps(self._store))
        if record.step in present:  # else it was removed before its record came here
            self._job.track(lambda run: run.log_checkpoint(name, directory, record.step, metrics))
        for step in self._checkpoints - present:
            self._job.track(lambda run, step=step: run.drop_checkpoint(step))  # type: ignore[misc]
        self._checkpoints = (self._checkpoints | {record.step}) & present


def _report_step(record: Record, steps: int) -> None:
    rates = {k: v for k, v in record.metrics.items() if k.endswith("_per_second") and k != "model_flops_per_second"}
    left = (steps - record.step) * record.metrics["step_time_s"]
    progress.report("train", record.step, max(steps, record.step), loss=record.metrics["loss"], **rates, eta_s=left)


class FolderWatch:
    """Say what the workers should take, what they remark, what failed and what was decided; tell the MLflow run too."""

    INTERVAL_S = 0.5

    def __init__(
        self,
        folder: RunFolder,
        track: Callable[[Callable[[Run], object]], None],
        asked: Mapping[str, Any] | None = None,
    ) -> None:
        """Start a thread that looks into the run's `folder` every INTERVAL_S, and has its MLflow run told.

        Args:
            asked: the spec, resolved, in which something may be `auto`.
        """
        self._folder, self._track, self._asked = folder, track, asked or {}
        self._chosen: dict[str, Any] = {}
        self._told = self._remarked = 0
        self._outlook: Outlook | None = None
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="tandem-failures", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Look a last time and end. What is tracked after the run's sender has stopped would be sent by nobody."""
        self._ending.set()
        self._thread.join()

    def _loop(self) -> None:
        while not self._ending.wait(self.INTERVAL_S):
            self._look()
        self._look()

    def _look(self) -> None:
        self._outlook = planned.say(self._folder, self._outlook, self._track)
        self._tell_remarks()
        self._tell_choices()
        found = self._folder.failures()
        for entry in found[self._told :]:
            who = f" on rank {entry['rank']}" if entry["rank"] is not None else ""
            who += f" on node {entry['where']}" if entry.get("where") else ""
            progress.say(f"{entry['kind']}{who} after step {entry['step']} → {entry['action']}: {entry['reason']}")
        if len(found) > self._told:
            page, count = postmortem.page(self._folder), len(found)
            self._track(lambda run: run.log_text(page, "post-mortem.md"))
            self._track(lambda run: run.set_tags({"tandem.failures": str(count)}))
        self._told = len(found)

    def _tell_remarks(self) -> None:
        remarks = self._folder.remarks()
        for remark in remarks[self._remarked :]:
            progress.say(remark)
        if len(remarks) > self._remarked:
            page = "".join(f"{remark}\n" for remark in remarks)
            self._track(lambda run: run.log_text(page, "remarks.txt"))
        self._remarked = len(remarks)

    def _tell_choices(self) -> None:
        with suppress(DamagedNote, OSError):  # whoever needs the note says so
            chosen = self._folder.choices.found(self._asked)
            if chosen != self._chosen:
                self._track(lambda run: run.log_params(chosen))
            self._chosen = chosen
