"""Makes a sweep's trials ready: an ordinary job's spec, the data that they share, a folder, tags of their runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cluster.errors import UserError
from jobs import lineage, parents, progress, spec_sweep, trial_table
from jobs.data import identity, prepare
from jobs.data.identity import Noted
from jobs.data.prepare import Prepared
from jobs.driver import mixing
from jobs.driver.job import Job, Part
from jobs.driver.standstill import ATTEMPT, Standstill
from jobs.driver.sweep import process, report
from jobs.driver.sweep.runner import Ready
from jobs.driver.sweep.trials import Journal, Trial, best
from jobs.run_folder import RunFolder
from jobs.spec import JobSpec
from jobs.worker import setup
from tracking.run import Run

LONGEST_NAME = 90
"""Characters of the sweep's name that its trials' begin with."""
VARIED = ("train", "settings", "files", "tokenizer", "task")
"""What of the data's identity may differ between trials, where a field of `task` or `data` does."""


class Trials:
    """Prepares the trials of a sweep, and tells of them."""

    def __init__(self, job: Job, journal: Journal, mode: str) -> None:
        assert job.spec.sweep is not None, "the phase has its section"
        self._job, self._journal, self._mode, self._sweep = job, journal, mode, job.spec.sweep
        self._varies = any(path.partition(".")[0] in ("task", "data") for path in self._sweep.fields)
        """Whether trials may have data of their own."""
        self._prepared: dict[str, Prepared] = {}

    def ready(self, number: int, values: dict[str, Any]) -> Ready | str:
        """Prepare a trial's folder and data; or return why it cannot be trained, in a sentence.

        Raises:
            UserError: no trial can be trained: the data is wrong, or not that of the sweep that goes on.
        """
        try:
            spec = trial_spec(self._job, number, values)
            if any(path.startswith("model.") for path in values):
                parents.check_architecture(spec, self._job.base)
        except (UserError, ValidationError) as error:
            return _in_a_sentence(error)
        try:
            prepared = self._encoded(spec)
        except UserError as error:
            if not self._varies:
                raise
            return str(error)
        self._check_same(prepared)
        steps = steps_of(spec, prepared)
        if wrong := mixing.too_often(spec, prepared, steps):
            return wrong
        process.ask(spec.resolved(), self._job.base, self._part(number, values))
        return Ready(self._folder(number), steps)

    def tell(self, trial: Trial) -> None:
        """Show how a trial stands, and keep the table in the sweep's run up to date."""
        known = self._journal.trials
        leading = best(known, self._mode)
        is_best = leading is not None and leading.number == trial.number
        trial_table.show(report.line(trial, self._sweep, is_best))
        if trial.ended == "failed" and RunFolder(self._folder(trial.number)).status() is None:
            name, tags = name_of(self._job, trial.number), self._tags(trial.number)
            key, reason = self._folder(trial.number).name, trial.reason
            self._job.track(lambda run: _failed_run(run, key, name, tags, reason))
        if trial.ended is not None:
            progress.report("sweep", sum(each.ended is not None for each in known), self._sweep.count)
            report.keep_table(self._job, known)

    def _folder(self, number: int) -> Path:
        return self._job.storage / "runs" / f"{self._job.folder.key}-t{number + 1:03d}"

    def _part(self, number: int, values: Mapping[str, Any]) -> Part:
        register = self._job.spec.register_
        chosen = {"trial": number + 1, "values": dict(values), "metric": self._sweep.metric}
        return Part(
            self._folder(number),
            self._tags(number),
            register.model if register else self._job.spec.name,
            {"sweep": self._job.folder.key, **chosen},
        )

    def _tags(self, number: int) -> dict[str, str]:
        run = self._job.sender.run
        parent = {"mlflow.parentRunId": run.run_id} if run else {}
        return {**parent, "tandem.sweep": self._job.folder.key, "tandem.trial": str(number + 1)}

    def _encoded(self, spec: JobSpec) -> Prepared:
        """Return the data of a trial, encoded once for all trials that encode it alike."""
        key = json.dumps([spec.task.model_dump(mode="json"), spec.data.model_dump(mode="json")], sort_keys=True)
        if key not in self._prepared:
            self._prepared[key] = self._encode(spec)
        return self._prepared[key]

    def _encode(self, spec: JobSpec) -> Prepared:
        job, throttle = self._job, progress.Throttle(0.5)
        standstill = Standstill(job.folder.stacks(ATTEMPT, 0), job.spec.failures.hang_after_s)

        def on_progress(phase: str, done: int, total: int, counts: Mapping[str, float]) -> None:
            standstill.beat()
            if done in (0, total) or throttle.ready():
                progress.report(phase, done, total, **counts)

        with standstill.watched():
            (prepared,) = prepare.stages(
                spec,
                job.base,
                job.storage,
                parent=job.parent,
                on_progress=on_progress,
                fetch=job.stored.fetch if job.stored else None,
                uri=job.stored.uri if job.stored else None,
            )
            if job.stored:
                job.stored.push(prepared)
        report.say_data(job, prepared)
        return prepared

    def _check_same(self, prepared: Prepared) -> None:
        """Note what the first trial learns from, and refuse anything else in those that follow.

        Raises:
            UserError: the data, or the model that the trials start from, has changed.
        """
        before = self._job.folder.data()
        if before is None:
            self._job.folder.keep_data(Noted(prepared.parts, prepared.rows, self._weights))
            return
        lineage.check_same(before.weights, self._weights, self._job.parent_uri)
        for said in identity.check_same(self._kept(before), prepared.parts, prepared.rows):
            progress.say(said)

    @cached_property
    def _weights(self) -> str:
        return lineage.weights_digest(self._job.parent)

    def _kept(self, before: Noted) -> Noted:
        """Return what of the data must be as when the sweep began."""
        if not self._varies:
            return before
        return replace(before, parts={part: d for part, d in before.parts.items() if part not in VARIED}, rows="")


def name_of(job: Job, number: int) -> str:
    """Return what a trial is called, its run in MLflow too."""
    return f"{job.spec.name[:LONGEST_NAME]}-{number + 1:03d}"


def trial_spec(job: Job, number: int, values: Mapping[str, Any]) -> JobSpec:
    """Return the spec of a trial: an ordinary job's, in the precision and from the version that the sweep began with.

    Raises:
        ValidationError: the spec refuses the values, each of which it takes alone.
    """
    resolved = job.spec.resolved()
    resolved["name"] = name_of(job, number)
    resolved["storage"] = job.stored.uri if job.stored else str(job.storage)
    resolved["training"]["precision"] = job.precision
    if job.parent_uri is not None:
        resolved["model"]["from"] = job.parent_uri
    return JobSpec.model_validate(spec_sweep.of_trial(resolved, values))


def steps_of(spec: JobSpec, prepared: Prepared) -> int:
    """Return the optimiser steps of a trial."""
    assert spec.training is not None, "a trial trains"
    return setup.total_steps(spec.training, prepared.train_rows)


def _in_a_sentence(error: UserError | ValidationError) -> str:
    if isinstance(error, UserError):
        return str(error)
    told = [(".".join(map(str, e["loc"])), e["msg"].removeprefix("Value error, ")) for e in error.errors()]
    return "; ".join(f"{at}: {what}" if at else what for at, what in told)


def _failed_run(parent: Run, key: str, name: str, tags: Mapping[str, str], reason: str) -> None:
    """Open the run of a trial that was never begun, and end it."""
    linked = {**tags, "mlflow.parentRunId": parent.run_id, "tandem.error": reason}
    Run.open(key, name, tags=linked).end("FAILED")
