"""SlurmSpec and a job → a batch script. Pure.

The script starts Ray by `srun`, a head on the first node and workers on the others, sends the job, and follows it. At
the signal before the limit it asks the job to save and stop, as `tandem jobs stop` does, puts itself back into the
queue, and goes on from the newest checkpoint the next time, as any spec that is submitted again.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from cluster.ray_process_internals import HEAD_SETTINGS, STOP_WAIT
from cluster.slurm.spec import SlurmSpec
from cluster.work import JobWork

BODY = Path(__file__).with_name("body.sh")
"""What does not depend on the spec: bash, to be read and checked as such."""
MARGIN_S = 30


def mistakes(spec: SlurmSpec, job: JobWork) -> Iterator[tuple[str, str]]:
    """Yield (key, sentence) for what cannot work."""
    group = job.workers
    rooms = [
        math.floor(offered / needed + 1e-9)
        for needed, offered in ((group.cpus, spec.cpus_per_node), (group.gpus, spec.gpus_per_node))
        if needed > 0
    ]
    room = spec.nodes * min(rooms, default=group.count)
    if room < group.count:
        yield (
            "nodes",
            f"{spec.nodes} nodes of {spec.cpus_per_node} CPUs and {spec.gpus_per_node} GPUs hold {room} of the "
            f"{group.count} workers that the job needs ({group.cpus:g} CPUs, {group.gpus:g} GPUs each): ask for more",
        )
    if spec.requeue and job.trains and not job.resumes:
        yield (
            "requeue",
            "and the job's checkpoint.resume: never do not go together: each allocation would begin anew; set requeue: "
            "false, or leave checkpoint.resume out",
        )
    for place in job.places:
        if place.written and "://" not in place.where and not place.where.startswith("/"):
            yield "home", f"the job's {place.key}, {place.where}, is relative: name a path that all nodes share"


def build(spec: SlurmSpec, job: JobWork, path: Path, overrides: Sequence[str] = ()) -> str:
    """Return the script.

    Args:
        path: the job's spec, absolute, on a file system that the first node sees.
        overrides: what is changed in it.
    """
    return "\n".join([*_header(spec, job), "", *_settings(spec, path, overrides), "", BODY.read_text(encoding="utf-8")])


def _header(spec: SlurmSpec, job: JobWork) -> list[str]:
    options = {
        "job-name": job.name,
        "nodes": spec.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": spec.cpus_per_node,
        "gpus-per-node": spec.gpus_per_node or None,
        "mem": spec.memory_per_node,
        "time": spec.time,
        "partition": spec.partition,
        "account": spec.account,
        "qos": spec.qos,
        "constraint": spec.constraint,
        "signal": f"B:USR1@{spec.save_s}",
        "output": f"{spec.home}/slurm/%x-%j.log",
        "open-mode": "append",
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None]
    requeue = "#SBATCH --requeue" if spec.requeue else "#SBATCH --no-requeue"
    made = "# Made by `tandem cluster sbatch`: change the spec and make it again, not this file."
    before = f"# Before: mkdir -p {spec.home}/slurm    Then: sbatch FILE"
    # What the settings assign is used below them; what `setup` sources is not here to be read.
    checked = "# shellcheck disable=SC1090,SC1091,SC2016,SC2154,SC2329"
    return ["#!/bin/bash", checked, made, before, *lines, requeue]


def _settings(spec: SlurmSpec, path: Path, overrides: Sequence[str]) -> list[str]:
    """Return the part of the script in which everything of the spec is."""
    stop_s = str(max(10, spec.save_s - MARGIN_S))
    exported = {
        **HEAD_SETTINGS,
        STOP_WAIT: stop_s,
        "MLFLOW_TRACKING_URI": spec.mlflow_uri,
        "TANDEM_HOME": spec.home,
        **spec.env,
    }
    options = [word for override in overrides for word in ("--set", override)]
    own = {
        "cpus_per_node": str(spec.cpus_per_node),
        "gpus_per_node": str(spec.gpus_per_node),
        "start_timeout_s": str(spec.start_timeout_s),
        "requeue": "yes" if spec.requeue else "no",
        "spec": str(path),
    }
    return [
        "set -euo pipefail",
        *(f"export {name}={shlex.quote(value)}" for name, value in exported.items()),
        *(f"{name}={shlex.quote(value)}" for name, value in own.items()),
        f"options=({' '.join(map(shlex.quote, options))})",
        *spec.setup,
    ]
