"""The driver of a job, inside the cluster.

    python -m jobs.driver SPEC [--set key.path=value …] [--profile STEPS]

This is the entry point of a Ray job, whether `tandem jobs submit` or plain `ray job submit` sends it. It exits 0 when
the job finished, 1 when it failed, 2 when the spec or the data is wrong; the MLflow run ends the same way.

What is heavy to import waits until the workers' processes have been asked for: they import the same meanwhile.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from cluster import connect, growth, placement, specfile, topology
from cluster.errors import UserError
from jobs import noise, profiled, progress
from jobs.driver import reach, stopping, storage, warm
from jobs.spec import JobSpec


def main(arguments: list[str] | None = None) -> int:
    """Run the job a spec describes; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.driver", description="Run one Tandem job on this Ray cluster."
    )
    parser.add_argument("spec", type=Path, help="the job's YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE", dest="overrides")
    parser.add_argument("--profile", type=int, default=0, metavar="STEPS", help="record so many steps, keep no model")
    options = parser.parse_args(arguments)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    noise.quiet()
    try:
        spec = specfile.load(options.spec, JobSpec, options.overrides)
        spec = profiled.of(spec, options.profile) if options.profile else spec
        base = Path(os.environ.get("TANDEM_SPEC_FOLDER") or options.spec.parent).absolute()
        storage.check(spec, base)
        stopping.end_before_it_begins()
        placed = connect_and_place(spec)
        reach.check(spec, base, placed)
        from jobs.driver import attempt

        return attempt.run_job(spec, base, placed, profile=options.profile)
    except UserError as error:
        progress.say(f"error: {error}")
        return error.exit_code


def connect_and_place(spec: JobSpec) -> dict[str, int]:
    """Connect to the cluster, make sure that the job fits, have its processes started; return how they are placed."""
    environment = warm.environment(spec)
    os.environ.update({name: value for name, value in environment.items() if name.startswith("RAY_TRAIN_")})
    connect.init_ray(log_to_driver=True, runtime_env={"env_vars": environment, **warm.executable()})
    stopping.end_before_it_begins()  # Ray has taken the signals for itself
    placed = check_it_fits(spec)
    if spec.phase != "sweep":  # whose trials have processes of their own
        warm.start(placed, controller=spec.training is not None)
    return placed


def check_it_fits(spec: JobSpec) -> dict[str, int]:
    """Return how many workers each node can take now, by node id; say what the job waits for if they do not fit yet.

    Raises:
        UserError: it cannot fit; Ray Train itself would wait for ever without a word.
    """
    wanted = spec.resources
    request = placement.Request(wanted.most, wanted.cpus_per_worker, wanted.gpus_per_worker)
    nodes = topology.own_nodes()
    answer = placement.fit_most(request, wanted.fewest, nodes, growth.at_full_size(nodes))
    if isinstance(answer, placement.Placement):
        return answer.workers_by_node
    if not answer.fits_when_free:
        raise UserError(f"resources: {answer.reason}; {answer.what_would_help}")
    progress.say(f"waiting: {answer.reason}; {answer.what_would_help}")
    return {}


def leave(code: int) -> None:
    """End this process now: taking apart an interpreter full of libraries takes seconds that somebody waits for."""
    if ray := sys.modules.get("ray"):
        ray.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
