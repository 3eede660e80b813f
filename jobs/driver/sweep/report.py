"""What a sweep tells: the table of its trials, in the log and in its run, and what the best one is trained with."""

from __future__ import annotations

import csv
import io
import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from jobs import progress
from jobs.data.prepare import Prepared
from jobs.driver.job import Job
from jobs.driver.sweep import plots, trials
from jobs.driver.sweep.trials import Trial
from jobs.spec_sweep import SweepSpec, phase_of
from jobs.trial_table import TrialLine


def line(trial: Trial, sweep: SweepSpec, is_best: bool) -> TrialLine:
    """Return a trial's line of the live table. Pure."""
    at = trial.evaluations[-1][0] if trial.evaluations else 0
    return TrialLine(
        number=trial.number,
        of=sweep.count,
        state=trial.ended or "running",
        step=trial.steps if trial.is_whole else at,
        steps=trial.steps,
        metric=sweep.metric,
        value=trial.value,
        values=trial.values,
        best=is_best,
        reason=trial.reason,
    )


def keep_table(job: Job, known: Sequence[Trial]) -> None:
    """Keep the table of the trials in the sweep's run, as CSV for people and JSON with all evaluations."""
    assert job.spec.sweep is not None, "the phase has its section"
    metric = job.spec.sweep.metric
    table, whole = as_csv(trials.rows(known, metric)), trials.as_json(known, metric)
    job.track(lambda run: run.log_text(table, "trials.csv"))
    job.track(lambda run: run.log_text(whole, "trials.json"))


def keep_plots(job: Job, known: Sequence[Trial], mode: str) -> None:
    """Keep pictures of the trials in the sweep's run."""
    assert job.spec.sweep is not None, "the phase has its section"
    for name, content in plots.pictures(known, job.spec.sweep, mode).items():
        job.track(lambda run, name=name, content=content: run.log_bytes(content, name))  # type: ignore[misc]


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows with the same keys as CSV; lists and the like as JSON. Pure."""
    written = io.StringIO()
    writer = csv.DictWriter(written, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: json.dumps(v) if isinstance(v, list | dict) else v for key, v in row.items()})
    return written.getvalue()


def command(spec: Mapping[str, Any], values: Mapping[str, Any]) -> str:
    """Return the command that trains with these values, from the sweep's own file. Pure.

    Args:
        spec: the sweep's, resolved.
    """
    settings = {"phase": phase_of(spec), "sweep": None, **values}
    changes = (shlex.quote(f"{path}={_as_yaml(value)}") for path, value in settings.items())
    return f"tandem jobs submit SPEC --set {' --set '.join(changes)}"


def _as_yaml(value: Any) -> str:
    return value if isinstance(value, str) and yaml.safe_load(value) == value else json.dumps(value)


def say_data(job: Job, prepared: Prepared) -> None:
    """Say what the trials learn from, and what was left out of it."""
    counted = f"{prepared.train_rows} rows to train on, {prepared.eval_rows} held out"
    progress.say(f"data {prepared.name}: {counted}{' (encoded before)' if prepared.cached else ''}")
    bad = [f"{prepared.bad_rows} bad rows left out; the first: {prepared.first_bad[0]}"] if prepared.bad_rows else []
    for said in (*prepared.notes, *bad, *prepared.bad_reasons):
        progress.say(said)
    job.track(lambda run: run.log_dataset(prepared.name, prepared.digest))
    job.track(lambda run: run.set_tags({"tandem.bad_rows": str(prepared.bad_rows)}))
