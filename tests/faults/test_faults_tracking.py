"""The tracking server dies, freezes, or never comes back: training does not notice, and nothing is lost."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request

import psutil
import pytest

from cluster import home, local
from cluster.connect import connection
from tests.support.fault_runs import ended, mlflow_client, run, submitted
from tracking import outbox

pytestmark = pytest.mark.usefixtures("cluster")
STEPS = 500
LONG = [f"training.steps={STEPS}", "checkpoint.every_steps=50"]


def server() -> psutil.Process:
    wanted = {"tracking.server", str(home.home() / "mlflow")}
    (found,) = [process for process in psutil.process_iter(["cmdline"]) if wanted <= {*(process.info["cmdline"] or ())}]
    return found


def wait_for_steps(storage, name: str, count: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for path in (storage / "runs").glob(f"{name}-*/spool/rank-0.jsonl"):
            if path.read_bytes().count(b'"loss"') >= count:
                return
        time.sleep(0.1)
    raise AssertionError(f"{name} has not done {count} steps")


def wait_for_server() -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{connection().tracking_uri}/health", timeout=1):
            return
        time.sleep(0.2)
    raise AssertionError("MLflow did not come back")


def complete(found) -> None:
    assert sorted(found.losses()) == list(range(1, STEPS + 1))
    assert found.run.info.status == "FINISHED"
    assert found.run.data.params["training.steps"] == str(STEPS)


def test_a_server_that_is_gone_for_a_minute(folder, storage):
    job = submitted(folder, "outage", *LONG)
    wait_for_steps(storage, "outage", 100)
    process = server()
    process.send_signal(signal.SIGKILL)
    killed_at = time.monotonic()
    wait_for_steps(storage, "outage", 200)  # training goes on meanwhile
    time.sleep(max(0.0, 60 - (time.monotonic() - killed_at)))
    local.up()  # starts what is missing: MLflow, where it was; the job goes on
    found = ended(job, storage, "outage")
    wait_for_server()
    if outbox.pending(storage / "runs"):  # the driver gave up after its 30 s
        outbox.settle(found.folder / "spool")
    assert found.status == "SUCCEEDED", found.log
    complete(found)


def test_a_server_that_accepts_and_never_answers(folder, storage):
    """The spool is kept, and `tandem tracking sync` sends it later."""
    job = submitted(folder, "silence", *LONG)
    wait_for_steps(storage, "silence", 100)
    process = server()
    process.send_signal(signal.SIGSTOP)
    try:
        wait_for_steps(storage, "silence", STEPS)
        found = ended(job, storage, "silence")
        assert found.status == "SUCCEEDED", found.log
        assert any("tandem tracking sync" in line for line in found.log)
        assert outbox.pending(storage / "runs") == [found.folder / "spool"]
    finally:
        process.send_signal(signal.SIGCONT)
    wait_for_server()
    code = "from tracking.cli import app; app()"
    done = subprocess.run(
        [sys.executable, "-c", code, "sync"], capture_output=True, text=True, env=dict(os.environ), check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"{found.folder.name}: " in done.stdout
    assert outbox.pending(storage / "runs") == []
    complete(found)


def test_a_server_that_is_away_when_the_job_starts(folder, storage):
    process = server()
    process.send_signal(signal.SIGSTOP)
    try:
        job = submitted(folder, "early", "training.steps=20")
        wait_for_steps(storage, "early", 20)
    finally:
        process.send_signal(signal.SIGCONT)
    found = ended(job, storage, "early")
    assert found.status == "SUCCEEDED", found.log
    if outbox.pending(storage / "runs"):
        outbox.settle(found.folder / "spool")
    assert sorted(found.losses()) == list(range(1, 21))
    assert found.run.info.status == "FINISHED"


def test_no_name_of_a_step_is_logged_twice_over_attempts(folder, storage):
    found = run(folder, storage, "twice", "training.steps=30", fault="kill:rank=0:step=17")
    assert found.status == "SUCCEEDED", found.log
    spooled = [json.loads(line) for line in (found.folder / "spool" / "rank-0.jsonl").read_text().splitlines()]
    repeated = [record["step"] for record in spooled if "loss" in record["metrics"]]
    assert len(repeated) > 30, "steps after the checkpoint were done twice"
    for key in ("loss", "gradient_norm", "learning_rate", "tokens_per_second"):
        points = mlflow_client().get_metric_history(found.run.info.run_id, key)
        assert sorted(point.step for point in points) == list(range(1, 31))
