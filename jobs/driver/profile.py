"""What workers have recorded of a profile → the job's log, its MLflow run, its result line."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from jobs import profiled, progress
from jobs.driver.job import Job
from jobs.driver.stopping import Stopped
from jobs.profiled import SHOWN, Profile
from tracking.run import Run


def published(job: Job) -> dict[str, Any]:
    """Show the first rank's table, have MLflow keep all files, and return where they are, with the costliest operators.

    Raises:
        Stopped: the job was asked to, before the last step was recorded.
    """
    files = sorted(path for path in job.folder.profile.glob("rank-*") if path.is_file())
    of_first = job.folder.profile / "rank-0.operators.json"
    if of_first not in files:
        raise Stopped
    for path in files:
        job.track(partial(_log, path))
    found = Profile.of(json.loads(of_first.read_text(encoding="utf-8")))
    progress.say(f"the costliest operators of {found.steps} steps on rank 0; all ranks' are in {job.folder.profile}")
    print(profiled.text(found), flush=True)
    shown = Profile(found.steps, found.self_cpu_ms, found.self_gpu_ms, found.operators[:SHOWN])
    return {"profile": str(job.folder.profile), "operators": shown.as_dict()}


def _log(path: Path, run: Run) -> None:
    run.log_file(path, "profile")
