"""Phase `sweep`: find good values for some fields of a spec by training with several, and keep the best model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from cluster import placement, stores, topology
from cluster.errors import UserError
from jobs import progress, spec_sweep, sweep_models
from jobs.driver.job import Job, end_if_lost
from jobs.driver.sweep import report, trials
from jobs.driver.sweep.launcher import Trials
from jobs.driver.sweep.runner import Runner
from jobs.driver.sweep.trials import Journal, Trial
from jobs.run_folder import RunFolder
from jobs.spec import JobSpec
from jobs.spec_sections import RegisterSpec
from jobs.tasks import get
from jobs.trial_table import in_short
from tracking import manifest, model_store, outbox, registry
from tracking.errors import ServerUnreachable

MLFLOW_S = 10.0
"""So long the first trial waits for the sweep's run, to be its child."""


class NoTrialFinished(UserError):
    """No trial of a sweep has left a model."""

    exit_code = 1


def sweep_phase(job: Job) -> dict[str, Any]:
    """Train with the values that the sweep tries, and register the best model.

    Raises:
        NoTrialFinished: all failed, or none came to its end.
    """
    sweep = job.spec.sweep
    assert sweep is not None, "the phase has its section"
    sweep_models.check(job.spec, job.base)
    mode = get(job.spec.task.name).metrics[sweep.metric]
    journal = Journal.read(job.folder.path)
    parallel = sweep.parallel or room(job.spec)
    which = "more" if mode == "max" else "less"
    progress.say(f"{sweep.count} trials, {parallel} at once; {which} {sweep.metric} is better")
    if journal.trials:
        progress.say(f"the sweep goes on: {trials.counts(journal.trials)}")
    wait_for_run(job)
    first = spec_sweep.baseline(job.spec.resolved(), sweep.fields) if sweep.baseline else None
    runner = Runner(sweep, mode, journal, Trials(job, journal, mode), parallel, first=first)
    try:
        runner.run()
    except BaseException:  # asked to stop, above all
        runner.end()
        raise
    finally:
        ended = trials.counts(journal.trials) or "none began"
        progress.say(f"trials: {ended}")
        job.track(lambda run: run.set_tags({"tandem.trials": ended}))
        report.keep_table(job, journal.trials)
        report.keep_plots(job, journal.trials, mode)
    end_if_lost(job.folder)
    return publish(job, chosen(journal, mode))


def room(spec: JobSpec) -> int:
    """Return how many trials the cluster has room for at once, if nothing else ran on it; 1 at least."""
    wanted = spec.resources
    request = placement.Request(wanted.fewest, wanted.cpus_per_worker, wanted.gpus_per_worker)
    return max(1, placement.capacity(request, topology.nodes()) // wanted.fewest)


def wait_for_run(job: Job) -> None:
    """Wait a little for MLflow: trials are children of the sweep's run from their first moment."""
    deadline = time.monotonic() + MLFLOW_S
    while job.sender.run is None and time.monotonic() < deadline:
        time.sleep(0.1)
    if job.sender.run is None:
        progress.say("MLflow does not answer: runs of trials that begin meanwhile are no children of the sweep's run")


def chosen(journal: Journal, mode: str) -> Trial:
    """Return the best trial.

    Raises:
        NoTrialFinished: none has a model.
    """
    found = trials.best(journal.trials, mode)
    if found is not None:
        return found
    failed = next((trial for trial in journal.trials if trial.ended == "failed"), None)
    first = f"; the first that failed, trial {failed.number + 1}: {failed.reason}" if failed else ""
    raise NoTrialFinished(f"no trial came to its end ({trials.counts(journal.trials) or 'none began'}){first}")


def publish(job: Job, best: Trial) -> dict[str, Any]:
    """Register the best model, and say how to train with its values."""
    sweep, register = job.spec.sweep, job.spec.register_
    assert sweep is not None, "the phase has its section"
    place = job.stored.model_of(best.run) if job.stored else RunFolder(job.storage / "runs" / best.run).model
    model = place if isinstance(place, Path) else model_store.fetched(place)
    shown = stores.shown(str(place))
    written = manifest.read(model)
    command = report.command(job.spec.resolved(), best.values)
    progress.say(f"best: trial {best.number + 1} ({in_short(best.values)}), {sweep.metric} {best.value:.4g}")
    progress.say(f"to train with these values: {command}")
    job.track(lambda run: run.log_metrics({f"best_{key}": value for key, value in written.evaluation.items()}))
    job.track(lambda run: run.set_tags({"tandem.best_trial": str(best.number + 1)}))
    uri = registered(job, place, register, written.run_id) if register is not None else None
    return {
        "best": {"trial": best.number + 1, "values": dict(best.values), sweep.metric: best.value},
        "command": command,
        "directory": shown,
        "evaluation": written.evaluation,
        "model": uri or shown,
    }


def registered(job: Job, model: Path | str, register: RegisterSpec, run_id: str | None) -> str | None:
    """Make the best model a version in the registry and return its URI; None where that has to wait for the server.

    Args:
        model: its folder, or the URI of it in a store.
        run_id: of the trial that trained it.
    """
    try:
        version = registry.register(register.model, model, run_id=run_id, alias=register.alias)
    except ServerUnreachable as error:
        progress.say(f"{register.model} is not registered yet: {error}")
        outbox.postpone(job.folder.spool, outbox.Version(register.model, str(model), register.alias))
        return None
    progress.say(f"registered {version.uri}{f' as @{register.alias}' if register.alias else ''}")
    return version.uri
