"""One attempt at a job: claim its folder, open its MLflow run, run its phase, end the run truthfully."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path

from cluster import devices, stores
from cluster.doctor.quick import QuickLook
from cluster.ray_process_internals import JOB_MARKER, SUBMISSION_ID
from jobs import lineage, parents, progress, run_choices
from jobs.claim import claim, claim_folder, claim_stored, claim_stored_folder
from jobs.driver import guard, phases, planned, postmortem, precision, preemption, pulse, storage, stored, stragglers
from jobs.driver.job import Job, Part, end_if_lost, lost
from jobs.driver.reporter import FolderWatch, Reporter
from jobs.driver.stopping import Stop, Stopped
from jobs.lease import Lease
from jobs.notes import DamagedNote
from jobs.run_folder import RunFolder
from jobs.run_notes import Saves
from jobs.spec import JobSpec
from jobs.storage.keeper import Keeper
from jobs.store_lease import StoreLease
from tracking import outbox
from tracking.errors import TrackingError
from tracking.outbox import Ending
from tracking.run import Run
from tracking.spool import SpoolSender


def run_job(spec: JobSpec, base: Path, placed: Mapping[str, int], part: Part | None = None, profile: int = 0) -> int:
    """Run `spec`, whose relative paths start at `base`, in this process and its worker group; return the exit code.

    Args:
        placed: how many workers each node takes, by node id.
        part: of a sweep's trial, what it is beside its spec.
        profile: how many steps are recorded, if it is a profile.

    Raises:
        RunIsOwned: another job works on the same run.
    """
    nodes = QuickLook(placed or _may_take(spec))
    root = storage.root(spec, base)
    parent = parents.find(spec, base)
    job_id = submission_id(os.environ)
    uri, folder, keeper, owned = _claimed(spec, base, root, part, job_id)
    with (
        owned.kept(lambda: lost(folder)),
        guard.guarded(folder, owned.number),
        stored.kept(uri, folder, keeper) as in_store,
    ):
        folder.begin()
        stop = Stop(folder, trains=spec.training is not None)
        stop.listen()
        tags = {**_tags(spec), **(part.tags if part else {}), **({"tandem.profile": str(profile)} if profile else {})}
        decision = precision.settle(spec, folder, placed)
        params = precision.in_params(spec, decision)
        outbox.own(folder.spool, Ending(folder.key, spec.name, "FAILED", params, tags))
        opened = partial(Run.open, folder.key, spec.name, params=params, tags=tags)
        sender = SpoolSender(folder.spool, opened, interval_s=0.5)
        job = Job(
            spec,
            base,
            root,
            folder,
            sender,
            parent,
            placed,
            decision.precision,
            stop,
            lineage.pinned(spec.model.source),
            part=part,
            profile=profile,
            stored=in_store,
            nodes=nodes,
        )
        where = stores.joined(stores.shown(uri), "runs", folder.key) if uri else folder.path
        progress.say(f"run {folder.key}{' goes on' if folder.resumed else ''} in {where}")
        job.track(lambda run: progress.say(f"MLflow {run.url}"))
        job.track(lambda run: run.log_dict(spec.resolved(), "spec.yaml"))
        sender.start(Reporter(job).take)
        preemption.start(folder, progress.say)
        pulse.start(folder, progress.say)
        stragglers.start(job)
        return _run_phase(job, Ending(folder.key, spec.name, "FAILED", params, tags))


def _claimed(
    spec: JobSpec, base: Path, root: Path, part: Part | None, job_id: str
) -> tuple[str | None, RunFolder, Keeper | None, Lease | StoreLease]:
    """Return the storage's URI if it has one, the folder of the run, who keeps it in the store, and the lease on it."""
    if (uri := storage.uri(spec, base)) is None:
        return None, *_without_keeper(claim_folder(part.folder, job_id) if part else claim(root, spec, job_id))
    if part:
        folder, owned, keeper = claim_stored_folder(uri, part.folder, job_id, (part.REQUEST, part.LOG))
    else:
        folder, owned, keeper = claim_stored(uri, root, spec, job_id)
    return uri, folder, keeper, owned


def _without_keeper(claimed: tuple[RunFolder, Lease]) -> tuple[RunFolder, None, Lease]:
    return claimed[0], None, claimed[1]


def _may_take(spec: JobSpec) -> list[str]:
    """Return the nodes that may take the workers of a job that waits for room; none for one worker."""
    wanted = spec.resources
    return devices.able_to_hold(wanted.cpus_per_worker, wanted.gpus_per_worker) if wanted.most > 1 else []


def _run_phase(job: Job, ending: Ending) -> int:
    """Run the job's phase and end its run as that went; return the exit code."""
    asked = job.spec.resolved()
    watch = FolderWatch(job.folder, job.track, asked)
    try:
        with job.stop:
            outcome = (phases.profile_phase if job.profile else phases.PHASES[job.spec.phase])(job)
        unsaved = unsaved_sentence(job.folder.saves(), outcome.get("model"))
        if unsaved is None:
            ending = replace(ending, status="FINISHED")
            if job.folder.resumed:  # what an earlier attempt ended of is over
                job.track(lambda run: run.set_tags({"tandem.error": ""}))
        else:
            job.track(lambda run: run.set_tags({"tandem.error": unsaved}))
    except Stopped:
        ending = replace(ending, status="KILLED")
        unsaved = unsaved_sentence(job.folder.saves(), None)
        progress.say(unsaved or "stopped; submit the same spec again to go on")
        return 1
    except Exception as found:
        error = storage.told(found, job.folder.path)
        reason = f"{type(error).__name__}: {error}"
        job.track(lambda run: run.set_tags({"tandem.error": reason}))
        job.track(lambda run: run.log_text(postmortem.page(job.folder, reason), "post-mortem.md"))
        raise error from found
    finally:
        failed = job.folder.saves().failed
        if failed:
            job.track(lambda run: run.set_tags({"tandem.checkpoints_failed": str(failed)}))
        watch.finish()
        with suppress(DamagedNote, OSError):
            ending = replace(ending, params=run_choices.merged(ending.params, job.folder.choices.found(asked)))
        planned.settle(job.folder, job.track)
        _end(job, ending)
    if unsaved is not None:
        progress.say(f"error: {unsaved}")
    counted = {"checkpoints_failed": failed} if failed else {}
    progress.result({"run": job.folder.key, **_run_address(job.sender), **outcome, **counted})
    return 0 if unsaved is None else 1


def unsaved_sentence(saves: Saves, model: object) -> str | None:
    """Say that the run's last checkpoint could not be saved; None where it was, or none was due. Pure.

    Args:
        model: where the trained model is; None: the job was stopped before its end.
    """
    if saves.error is None:
        return None
    count = "no checkpoint" if not saves.saved else f"the last of {saves.saved + saves.failed} checkpoints"
    could = "could be saved" if not saves.saved else f"could not be saved ({saves.failed} failed in all)"
    there = f"the model is in {model}, but" if model else "stopped, but"
    return f"{there} {count} {could}: {saves.error}"


def _end(job: Job, ending: Ending) -> None:
    """Send what is left and close the run. A tracking server that is down changes nothing about the job's result."""
    end_if_lost(job.folder)
    spool = job.folder.spool
    # The note first: who finds a run that has ended in its folder alone would tell MLflow that it failed.
    for keep in (lambda: outbox.note(spool, ending), lambda: job.folder.write_status(ending.status)):
        try:
            keep()
        except OSError as error:
            progress.say(f"warning: the run's end cannot be noted in {job.folder.path}: {error}")
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


def submission_id(environment: Mapping[str, str]) -> str:
    """Return the id by which the driver with this environment was submitted; empty where it was not."""
    try:
        return str(json.loads(environment[JOB_MARKER])["metadata"][SUBMISSION_ID])
    except (KeyError, ValueError, TypeError):
        return ""


def _tags(spec: JobSpec) -> dict[str, str]:
    try:
        version = metadata.version("tandem-ray")
    except metadata.PackageNotFoundError:
        version = "source"
    tags = {"tandem.phase": spec.phase, "tandem.task": spec.task.name, "tandem.spec_digest": spec.digest()}
    tags["tandem.code_version"] = os.environ.get("TANDEM_CODE_VERSION", version)
    return tags
