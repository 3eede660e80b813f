"""What KubeRay does to a job, done to a real cluster: its submit command, a retry, and a pod that is taken away."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import home, ray_internals, specfile
from cluster.kubernetes import manifests
from cluster.kubernetes.spec import DeploymentSpec
from cluster.local import LocalCluster
from jobs import submit, work
from jobs.worker import fault_injection
from tests.support.fault_runs import SPEC, owner_of, steps_of, submitted, wait_for, wait_for_folder
from tests.support.own_cluster import own_cluster

ROOT = Path(__file__).parents[2]
PACED = "pace:rank=0:step=1"


@pytest.fixture(scope="module")
def pod() -> Iterator[LocalCluster]:
    """A cluster that stands for the pods."""
    with own_cluster(cpus=2) as started:
        yield started


def environment(pod: LocalCluster) -> dict[str, str]:
    own = {"RAY_ADDRESS": pod.ray_address, "PYTHONPATH": str(ROOT)}
    return {**os.environ, **own, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(pod.token_path)}


def send(pod: LocalCluster, job: dict[str, Any], files: Path, attempt: str) -> None:
    """Run the command that KubeRay makes of a RayJob's spec; a pod's image has Tandem, which a variable does here."""
    variables = {
        "PYTHONPATH": str(ROOT),
        "MLFLOW_TRACKING_URI": str(pod.mlflow_url),
        fault_injection.VARIABLE: PACED,
    }
    asked = yaml.safe_load(job["runtimeEnvYAML"])
    runtime = json.dumps({"working_dir": str(files) + asked["working_dir"], "env_vars": variables})
    options = ["--runtime-env-json", runtime, "--metadata-json", json.dumps(job["metadata"])]
    command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", str(pod.dashboard_url)]
    words = [*command, *options, "--submission-id", attempt, "--no-wait", "--", *shlex.split(job["entrypoint"])]
    sent = subprocess.run(words, env=environment(pod), capture_output=True, text=True, timeout=120)
    assert sent.returncode == 0, sent.stdout + sent.stderr


def test_a_retry_goes_on_from_the_newest_checkpoint(pod: LocalCluster, tmp_path: Path) -> None:
    spec = {**SPEC, "name": "retried", "resources": {"workers": 1}, "checkpoint": {"every_steps": 10}}
    spec["training"] = {**spec["training"], "steps": 60, "deepspeed": {"zero_stage": 1}}
    (tmp_path / "retried.yaml").write_text(yaml.safe_dump(spec))
    text = "name: lab\nimage: a/b:1\nstorage: {claim: {mount: /data}}\njob: {retries: 1}\n"
    deployment = specfile.loads(text, DeploymentSpec)
    made = manifests.objects(deployment, work.read(tmp_path / "retried.yaml", []), None, with_cluster=False)
    files, job = made["rayjob.yaml"][:2]
    container = job["spec"]["submitterPodTemplate"]["spec"]["containers"][0]
    for mount in container["volumeMounts"]:  # the submitter's own files
        place = tmp_path / "pod" / mount["mountPath"].lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(files["data"][mount["subPath"]])

    send(pod, job["spec"], tmp_path / "pod", "retried-first")
    run = wait_for_folder(home.home() / "storage", "retried")
    wait_for(lambda: list(run.glob("checkpoints/step-*/MANIFEST.json")), "the first checkpoint")
    owner_of(run).kill()  # the cluster is lost
    wait_for(lambda: submit.known("retried-first") == "FAILED", "the first attempt's end")
    before = steps_of(run)
    assert 10 <= before < 60

    send(pod, job["spec"], tmp_path / "pod", "retried-again")
    wait_for(lambda: submit.known("retried-again") in submit.TERMINAL, "the second attempt's end")
    assert submit.known("retried-again") == "SUCCEEDED", submit.logs("retried-again")
    assert "goes on in" in submit.logs("retried-again")
    [model] = (home.home() / "storage" / "runs").glob("retried-*/model/tandem.json")
    assert model.parent.parent == run
    assert steps_of(run) < before + 60, "it did not begin anew"


def test_a_pod_that_ends_has_its_job_saved(pod: LocalCluster, tmp_path: Path) -> None:
    """The last test here: a node stays announced until its raylet ends."""
    settings = ["training.steps=2000", "checkpoint.every_steps=100000", "resources.workers=1"]
    job = submitted(tmp_path, "leaving", *settings, "training.deepspeed.zero_stage=1", fault=PACED)
    run = wait_for_folder(home.home() / "storage", "leaving")
    wait_for(lambda: steps_of(run) > 5, "the first steps")
    began = time.monotonic()
    command = [sys.executable, "-m", "cluster.kubernetes.leave", "--seconds", "20", "--head"]
    left = subprocess.run(command, env=environment(pod), capture_output=True, text=True, timeout=90, cwd=ROOT)
    assert (left.returncode, "1 nodes announced" in left.stdout) == (0, True), left.stdout + left.stderr
    assert time.monotonic() - began >= 20, "the job still runs, and is waited for"
    assert list(run.glob("checkpoints/step-*/MANIFEST.json"))
    assert "will be taken away" in submit.logs(job)
    assert len(ray_internals.alive_nodes(pod.ray_address)) == 1
    submit.stop(job)
