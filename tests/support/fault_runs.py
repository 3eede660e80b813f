"""The rig of the fault tests: one small job, its unfaulted run to compare with, and the proof that a fault happened."""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from cluster import connect, shipping
from cluster.connect import connection
from jobs import submit
from jobs.worker import fault_injection
from tests.support import members
from tracking import outbox

SPEC: dict[str, Any] = {
    "name": "faulted",
    "phase": "pretrain",
    "model": {
        "architecture": "llama",
        "config": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "tie_word_embeddings": True,
        },
    },
    "data": {
        "train": "python-stdlib",
        "max_examples": 40,
        "eval_fraction": 0,
        "sequence_length": 64,
        "tokenizer": {"train": "bpe", "vocab_size": 512},
    },
    "training": {
        "steps": 40,
        "global_batch_size": 6,
        "learning_rate": 3e-3,
        "precision": "fp32",
        "deepspeed": {"zero_stage": 3},
    },
    "resources": {"workers": 2},
    "checkpoint": {"every_steps": 10},
}


LIMIT_S = 240.0


@dataclass
class Faulted:
    """A job that ended, and everything it left behind."""

    status: str
    folder: Path
    log: list[str]
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def run(self) -> Any:
        """The MLflow run; there is one."""
        client, key = mlflow_client(), self.folder.name
        experiment = client.get_experiment_by_name("tandem")
        (found,) = client.search_runs([experiment.experiment_id], f"tags.`tandem.run_key` = '{key}'")
        return found

    def losses(self) -> dict[int, float]:
        """The loss of each step, as MLflow has it; each step once."""
        points = mlflow_client().get_metric_history(self.run.info.run_id, "loss")
        steps = [point.step for point in points]
        assert len(steps) == len(set(steps)), "a step was logged twice"
        return {point.step: point.value for point in points}

    def failures(self) -> list[dict[str, Any]]:
        """What the failure policy wrote down."""
        path = self.folder / "failures.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def injected(self) -> set[str]:
        """The faults that happened."""
        return {path.name for path in (self.folder / "faults").glob("*")}

    def rows(self) -> dict[int, list[int]]:
        """The rows of each step, over all ranks, as its last attempt took them; the fault `rows` notes them."""
        last: dict[tuple[int, str], list[int]] = {}
        for path in sorted((self.folder / "rows").glob("*.jsonl")):
            for line in path.read_text().splitlines():
                taken = json.loads(line)
                last[taken["step"], path.stem] = taken["rows"]
        found: dict[int, list[int]] = {}
        for (step, _), rows in last.items():
            found.setdefault(step, []).extend(rows)
        return found

    def page(self) -> str:
        """The post-mortem page in the MLflow run."""
        return artifact(self.run.info.run_id, "post-mortem.md")


def submitted(folder: Path, name: str, *overrides: str, fault: str = "", spec: dict[str, Any] | None = None) -> str:
    """Submit the small job under a name; return its job id."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**(spec or SPEC), "name": name}))
    with environment(fault):
        return submit.submit(path, list(overrides))


def submitted_plainly(folder: Path, name: str, *overrides: str, fault: str, patience_s: int) -> str:
    """Submit the small job as `ray job submit` does, to a Ray that waits so long for a job that it stops."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**SPEC, "name": name}))
    entry_point = shlex.join(["python", "-m", "jobs.driver", path.name, *(w for o in overrides for w in ("--set", o))])
    variables = {fault_injection.VARIABLE: fault, "RAY_JOB_STOP_WAIT_TIME_S": str(patience_s)}
    with shipping.copied(folder, also=path) as working_dir:
        return connect.submit(entry_point, submission_id=name, working_dir=working_dir, env_vars=variables, metadata={})


def ended(job_id: str, storage: Path, name: str, on_line: Callable[[str], None] = lambda line: None) -> Faulted:
    """Follow a job to its end; one that is still running after LIMIT_S is stopped, so that its test fails."""
    limit = threading.Timer(LIMIT_S, submit.stop, [job_id])
    limit.start()
    try:
        outcome = submit.follow(job_id, lambda line, meaning: on_line(line))
    finally:
        limit.cancel()
    (folder,) = (storage / "runs").glob(f"{name}-????????-*")
    return Faulted(outcome.status, folder, outcome.log, outcome.result)


def run(folder: Path, storage: Path, name: str, *overrides: str, fault: str = "", **keywords: Any) -> Faulted:
    """Submit the small job and follow it to its end."""
    return ended(submitted(folder, name, *overrides, fault=fault, **keywords), storage, name)


@contextmanager
def environment(fault: str) -> Iterator[None]:
    """Have submitted jobs inject a fault."""
    os.environ[fault_injection.VARIABLE] = fault
    try:
        yield
    finally:
        del os.environ[fault_injection.VARIABLE]


def same_curve(found: dict[int, float], expected: dict[int, float], tolerance: float = 1e-4) -> None:
    """Assert that both runs have the same steps with the same losses."""
    assert sorted(found) == sorted(expected)
    for step, loss in expected.items():
        assert math.isclose(found[step], loss, rel_tol=tolerance), f"step {step}: {found[step]} instead of {loss}"


def wait_for(condition: Callable[[], object], what: str, timeout_s: float = 90) -> None:
    """Return when the condition holds; fail after the time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {timeout_s} s"
        time.sleep(0.1)


def wait_for_folder(storage: Path, name: str) -> Path:
    """Return the folder of a run once it is there."""
    wait_for(lambda: list((storage / "runs").glob(f"{name}-????????-*/status.json")), f"run {name}")
    (status,) = (storage / "runs").glob(f"{name}-????????-*/status.json")
    return status.parent


def steps_of(run: Path) -> int:
    """Return how many steps the first rank has spooled, over all attempts."""
    path = run / "spool" / "rank-0.jsonl"
    return path.read_bytes().count(b'"loss"') if path.exists() else 0


def time_of_step(found: Faulted, step: int) -> float:
    """Return when a step was logged, in seconds since the epoch."""
    points = mlflow_client().get_metric_history(found.run.info.run_id, "loss")
    return next(point.timestamp for point in points if point.step == step) / 1000


def driver_of(name: str) -> psutil.Process:
    """Return the process of a job's driver that Ray has started: the shadow of the one that works."""
    (driver,) = members.running("jobs.driver", f"{name}.yaml")
    return driver


def owner_of(run: Path) -> psutil.Process:
    """Return the process of a job's driver that works."""
    return psutil.Process(json.loads((run / "spool" / outbox.OWNER).read_text())["pid"])


def tree_of(process: psutil.Process) -> list[psutil.Process]:
    """Return a process and all below it."""
    return [process, *process.children(recursive=True)]


def follower(job_id: str) -> subprocess.Popen[str]:
    """Follow a job in a process of its own, as at a terminal, whether or not these tests ignore SIGINT."""
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\nfrom jobs.cli import app; app()"
    command = [sys.executable, "-c", code, "logs", job_id, "--follow"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def workers() -> list[psutil.Process]:
    """List the workers of the cluster's training jobs."""
    return members.named("ray::RayTrain")


def no_workers_left() -> None:
    """Assert that the workers of all jobs of the cluster end within a few seconds."""
    assert psutil.wait_procs(workers(), timeout=15)[1] == [], "its workers are gone"


def write(path: str, value: object) -> None:
    """Write a value into a file of the kernel's."""
    Path(path).write_text(str(value), encoding="ascii")


def removed(folder: str) -> bool:
    """Remove an empty folder of the kernel's; say whether it is gone."""
    with suppress(OSError):
        os.rmdir(folder)
    return not Path(folder).exists()


def forked_for(daemon: psutil.Process) -> list[psutil.Process]:
    """List what the fork server of a node made, and itself: nobody's children, but they go with the machine."""
    raylets = {str(process.pid) for process in (daemon, *daemon.children(recursive=True))}
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("RAY_RAYLET_PID") in raylets:
                found.append(process)
    return found


def mlflow_client() -> Any:
    """Return a client of the cluster's MLflow."""
    from mlflow.tracking import MlflowClient

    return MlflowClient(connection().tracking_uri)


def artifact(run_id: str, name: str) -> str:
    """Return a text artifact of a run."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return Path(mlflow_client().download_artifacts(run_id, name, folder)).read_text()
