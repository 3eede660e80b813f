"""The batch script for real, with stand-ins for Slurm's commands alone: it saves at the signal, and goes on."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from cluster import specfile
from cluster.slurm import script
from cluster.slurm.spec import SlurmSpec
from jobs import work
from jobs.worker import fault_injection
from tests.support import slurm
from tests.support.fault_runs import SPEC, steps_of, wait_for
from tests.support.mlflow_server import REPOSITORY, MlflowServer

STEPS = 100
PACED = "pace:rank=0:step=1"


@pytest.fixture
def shared() -> Iterator[Path]:
    """A home that all nodes share; short, and gone afterwards with what still runs in it."""
    place = Path(tempfile.mkdtemp(prefix="sl-", dir="/tmp"))
    try:
        yield place
    finally:
        for process in running(str(place)):
            process.kill()
        shutil.rmtree(place, ignore_errors=True)


def running(word: str) -> list[psutil.Process]:
    """Return the processes whose command line has a word in it."""
    return [each for each in psutil.process_iter(["cmdline"]) if word in " ".join(each.info["cmdline"] or [])]


def environment() -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "TANDEM_HOME", "MLFLOW"))}
    return {**own, "PYTHONPATH": str(REPOSITORY)}


def test_it_saves_before_the_limit_and_goes_on_in_the_next_allocation(shared: Path, tmp_path: Path) -> None:
    job = {**SPEC, "name": "queued", "checkpoint": {"every_steps": 100_000}}
    job["training"] = {**job["training"], "steps": STEPS, "deepspeed": {"zero_stage": 1}}
    (tmp_path / "queued.yaml").write_text(yaml.safe_dump(job))
    queue, log = slurm.Slurm(tmp_path, 4_000_000 + os.getpid() % 4000, nodes=2), tmp_path / "log"
    mlflow = MlflowServer(tmp_path / "mlflow")
    mlflow.start()
    try:
        allocation = {"nodes": 2, "cpus_per_node": 1, "home": str(shared), "mlflow_uri": mlflow.url}
        allocation |= {"env": {fault_injection.VARIABLE: PACED}}
        spec = specfile.loads(yaml.safe_dump(allocation), SlurmSpec)
        wanted = work.read(tmp_path / "queued.yaml", [])
        assert list(script.mistakes(spec, wanted)) == []
        batch = tmp_path / "queued.sbatch"
        batch.write_text(script.build(spec, wanted, tmp_path / "queued.yaml"))

        first = queue.start(batch, log, environment())
        wait_for(lambda: first.poll() is not None or list((shared / "storage" / "runs").glob("queued-*")), "a run")
        [run] = (shared / "storage" / "runs").glob("queued-*")
        wait_for(lambda: first.poll() is not None or steps_of(run) > 20, "twenty steps")
        slurm.warn(first)
        assert (first.wait(120), queue.requeued) == (0, [str(queue.job_id)]), log.read_text()
        [saved] = run.glob("checkpoints/step-*/MANIFEST.json")
        step = int(saved.parent.name.removeprefix("step-"))
        assert 20 < step < STEPS

        second = queue.start(batch, log, environment())
        assert (second.wait(240), queue.requeued) == (0, [str(queue.job_id)]), log.read_text()
        assert [path.name for path in (shared / "storage" / "runs").glob("queued-*")] == [run.name]
        assert (run / "model" / "tandem.json").exists()
        assert steps_of(run) == STEPS, "no step was done twice"
        assert "goes on in" in log.read_text()
        assert not list((shared / "slurm").glob("*/auth_token"))
        assert running(f"/tmp/tandem-{queue.job_id}") == [], "Ray ends with the allocation"
    finally:
        mlflow.kill()
        for process in running(f"/tmp/tandem-{queue.job_id}"):
            process.kill()
        for place in Path("/tmp").glob(f"tandem-{queue.job_id}*"):
            shutil.rmtree(place, ignore_errors=True)
