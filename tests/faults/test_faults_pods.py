"""A pod that Kubernetes takes away announces its node: the job in it saves before, without being asked otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from cluster import home, ray_internals
from jobs import submit
from tests.support.fault_runs import submitted, wait_for, wait_for_folder
from tests.support.own_cluster import own_cluster

ROOT = Path(__file__).parents[2]
PACED = "pace:rank=0:step=1"


def test_a_pod_that_ends_has_its_job_saved(tmp_path: Path) -> None:
    with own_cluster(cpus=2) as cluster:
        settings = ["training.steps=2000", "checkpoint.every_steps=100000", "resources.workers=1"]
        job = submitted(tmp_path, "leaving", *settings, "training.deepspeed.zero_stage=1", fault=PACED)
        run = wait_for_folder(home.home() / "storage", "leaving")
        wait_for(lambda: (run / "spool" / "rank-0.jsonl").exists(), "the first steps")
        began = time.monotonic()
        command = [sys.executable, "-m", "cluster.kubernetes.leave", "--seconds", "20", "--head"]
        environment = {**os.environ, "RAY_ADDRESS": cluster.ray_address, "PYTHONPATH": str(ROOT)}
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(cluster.token_path)}
        left = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90, cwd=ROOT)
        assert (left.returncode, "1 nodes announced" in left.stdout) == (0, True), left.stdout + left.stderr
        assert time.monotonic() - began >= 20, "the job still runs, and is waited for"
        assert list(run.glob("checkpoints/step-*/MANIFEST.json"))
        assert "will be taken away" in submit.logs(job)
        assert len(ray_internals.alive_nodes(cluster.ray_address)) == 1
        submit.stop(job)
