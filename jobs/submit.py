"""A spec → a Ray job, and a live view of it."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import secrets
import shlex
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster import connect, shadows, shipping, specfile
from cluster.errors import UserError
from jobs import parents, profiled, progress
from jobs.plan import at_submit
from jobs.spec import JobSpec
from jobs.worker import fault_injection, zero

TERMINAL = ("SUCCEEDED", "FAILED", "STOPPED")
ENTRY_POINT = "python -m jobs.driver"
PATIENCE_S = 45.0
MESSAGE_CHARACTERS = 1000


class ClusterLost(UserError):
    """The cluster is gone while a job is followed."""

    exit_code = 1


@dataclass
class Outcome:
    """How a followed job ended."""

    job_id: str
    status: str
    result: dict[str, Any] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    """The last lines that were no progress."""
    exit_code: int = 0
    """The driver's: 0 finished, 2 the spec or the data is wrong, 1 anything else, also where it said none."""
    message: str = ""
    """What Ray says of the end: the only reason there is where the driver never began, or was killed."""

    @property
    def error(self) -> str | None:
        """The driver's own sentence about what was wrong, if it said one."""
        errors = [line for line in self.log if line.startswith("tandem: error: ")]
        return errors[-1].removeprefix("tandem: error: ") if errors else None


def submit(path: Path, overrides: list[str], profile: int = 0) -> str:
    """Validate the spec at `path` and send it to the cluster; return the job's id.

    Args:
        profile: of how many steps a profile is wanted, and nothing else; 0: the job itself.

    Raises:
        UserError: the spec is wrong, or there is no cluster. Nothing was submitted.
    """
    spec = specfile.load(path, JobSpec, overrides)
    spec = profiled.of(spec, profile) if profile else spec
    shadows.check_own_module(spec.task.name, path.absolute().parent)
    zero.read_named(spec.training, path.absolute().parent)
    where = connect.connection()
    missing = parents.preflight(spec, path.absolute().parent, where.tracking_uri)
    if missing and where.is_local:
        raise UserError(missing)
    environment = {"TANDEM_SPEC_FOLDER": str(path.absolute().parent)} if where.is_local else {}
    if fault_injection.VARIABLE in os.environ:
        environment[fault_injection.VARIABLE] = os.environ[fault_injection.VARIABLE]
    options = [word for override in overrides for word in ("--set", override)]
    options += ["--profile", str(profile)] if profile else []
    entry_point = shlex.join([*shlex.split(ENTRY_POINT), path.name, *options])
    job_id = f"{re.sub(r'[^A-Za-z0-9_-]', '-', spec.name)}-{secrets.token_hex(3)}"
    metadata = {"tandem.name": spec.name, "tandem.phase": spec.phase}
    with shipping.copied(path.absolute().parent, also=path) as working_dir:
        return connect.submit(
            entry_point, submission_id=job_id, working_dir=working_dir, env_vars=environment, metadata=metadata
        )


def planned(path: Path, overrides: list[str]) -> str:
    """Return in one line what the job at `path` should take on this machine, or why that is not known; or nothing.

    The job is on its way: this takes PATIENCE_S of jobs/plan/at_submit.py at most, and nothing from the job.

    Nothing of a job that trains none, and of one that runs elsewhere: its own log says it of the workers that it gets.
    """
    spec = specfile.load(path, JobSpec, overrides)
    if spec.training is None or not connect.connection().is_local:
        return ""
    return at_submit.said(path, overrides)


def follow(job_id: str, on_line: Callable[[str, progress.Progress | None], None]) -> Outcome:
    """Read a job's log until it ends. `on_line` gets each line, and its meaning where it is progress.

    A cluster that is away for a moment is waited for, and no line is shown twice.

    Raises:
        ClusterLost: it has not answered for PATIENCE_S.
    """
    import aiohttp

    client = connect.job_client()
    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)  # says that the stream was closed
    outcome = Outcome(job_id, "PENDING")
    seen, lost_at = 0, 0.0

    async def read() -> None:
        nonlocal seen
        number, rest = 0, ""
        async for text in client.tail_job_logs(job_id):
            *lines, rest = (rest + text).split("\n")
            for line in lines:
                number += 1
                if number > seen:
                    seen = number
                    _take(line, outcome, on_line)
            if outcome.result:  # the last line of a job; the log itself ends seconds later
                return
        if rest and number >= seen:  # a last line without an end; read again, it must not come twice
            seen = number + 1
            _take(rest, outcome, on_line)

    while outcome.status not in TERMINAL:
        try:
            if not outcome.result:
                asyncio.run(read())
            outcome.status = str(client.get_job_status(job_id).value)
            lost_at = 0.0
        except (OSError, RuntimeError, aiohttp.ClientError) as error:
            lost_at = lost_at or time.monotonic()
            if time.monotonic() - lost_at > PATIENCE_S:
                raise ClusterLost(
                    f"the cluster at {client.get_address()} does not answer any more; what {job_id} has saved is on "
                    "the disk: start the cluster again and submit the same spec to go on"
                ) from error
        if outcome.status not in TERMINAL:
            time.sleep(0.2)
    if outcome.status != "SUCCEEDED":
        info = client.get_job_info(job_id)
        outcome.exit_code, outcome.message = info.driver_exit_code or 1, ending(info.message or "")
    return outcome


def ending(message: str) -> str:
    """Return what Ray's message about a job's end says, without the log that it repeats, and in plain words. Pure."""
    said = message.partition(", last available logs")[0].strip()
    code = re.search(r"failed with exit code (\d+)", said)
    number = int(code[1]) - 128 if code else 0
    if number == signal.SIGKILL:
        return "its driver was killed (SIGKILL): by somebody, or by the kernel for memory"
    if number in set(signal.Signals):
        return f"its driver was ended by {signal.Signals(number).name}"
    return said[:MESSAGE_CHARACTERS]


def _take(line: str, outcome: Outcome, on_line: Callable[[str, progress.Progress | None], None]) -> None:
    meaning = progress.parse(line)
    if isinstance(meaning, dict):
        outcome.result = meaning
        return
    if meaning is None:
        outcome.log = [*outcome.log[-200:], line]
    on_line(line, meaning)


def list_jobs() -> list[dict[str, Any]]:
    """Return the cluster's jobs, newest first: id, name, phase, status, start and end (ms since 1970), message."""
    found = [
        {
            "id": job.submission_id,
            "name": (job.metadata or {}).get("tandem.name", ""),
            "phase": (job.metadata or {}).get("tandem.phase", ""),
            "status": str(job.status.value),
            "started_ms": job.start_time,
            "ended_ms": job.end_time,
        }
        for job in connect.job_client().list_jobs()
        if job.submission_id
    ]
    return sorted(found, key=lambda job: -(job["started_ms"] or 0))


def known(job_id: str) -> str:
    """Return the status of a job.

    Raises:
        UserError: there is no such job; the newest ones are named.
    """
    for job in list_jobs():
        if job["id"] == job_id:
            return str(job["status"])
    newest = ", ".join(job["id"] for job in list_jobs()[:5]) or "none"
    raise UserError(f"no job {job_id!r} on this cluster; the newest: {newest} (`tandem jobs list` shows all)")


def stop(job_id: str) -> bool:
    """Ask a job to stop; it writes a checkpoint first. Return False if it had ended already."""
    return known(job_id) not in TERMINAL and connect.job_client().stop_job(job_id)


def logs(job_id: str) -> str:
    """Return what a job has printed."""
    known(job_id)
    return str(connect.job_client().get_job_logs(job_id))
