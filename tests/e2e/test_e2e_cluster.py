"""The local cluster as a user meets it: the real command line, in processes of its own, in a home of its own."""

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from cluster import connect, local, topology
from cluster.connect import Connection
from cluster.errors import UserError

ROOT = Path(__file__).parents[2]
SAVES_WHEN_STOPPED = """
import os, signal, sys, time
from cluster.connect import connection, init_ray
import ray
def stop(*_):
    time.sleep(2)
    open(os.environ["SAVED"], "w").write("saved")
    sys.exit()
init_ray()
signal.signal(signal.SIGTERM, stop)  # after ray.init, which sets a handler of its own
found = connection()
print(found.ray_address, found.tracking_uri, ray.cluster_resources()["CPU"], flush=True)
time.sleep(60)
"""


class Machine:
    """A user's shell with a Tandem home of its own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        without = ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
        kept = {name: value for name, value in os.environ.items() if name not in without}
        self.env = {**kept, "TANDEM_HOME": str(home), "PYTHONPATH": str(ROOT)}

    def python(self, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(command, env=self.env, cwd=self.home, capture_output=True, text=True, timeout=300)

    def tandem_cluster(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.python("from cluster.cli import app; app()", *arguments)

    def processes(self) -> list[psutil.Process]:
        """List every process that has this home in its environment or its command line."""
        return [process for process in psutil.process_iter() if str(self.home) in _described(process)]


def _described(process: psutil.Process) -> str:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return ""
        return " ".join([*process.cmdline(), *process.environ().values()])
    except psutil.Error:
        return ""


@pytest.fixture
def machine() -> Iterator[Machine]:
    with tempfile.TemporaryDirectory(prefix="tc-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        found = Machine(Path(folder))
        yield found
        found.tandem_cluster("down", "--job-grace-s", "0")


def test_up_status_job_down(machine: Machine) -> None:
    assert machine.tandem_cluster("status").returncode == 3

    up = machine.tandem_cluster("up", "--cpus", "3", "--nodes", "1", "--cpus-per-node", "2", "--json")
    assert up.returncode == 0, up.stderr
    addresses = json.loads(up.stdout)
    before = {process.pid for process in machine.processes()}

    again = machine.tandem_cluster("up", "--json")
    assert again.stdout == up.stdout
    assert {process.pid for process in machine.processes()} == before

    saved = machine.home / "saved"
    script = machine.home / "work" / "job.py"
    script.parent.mkdir()
    script.write_text(SAVES_WHEN_STOPPED)
    submitted = machine.python(
        "import sys; from pathlib import Path; from cluster.connect import submit;"
        "submit('python job.py', submission_id='e2e', working_dir=Path(sys.argv[1]), env_vars={'SAVED': sys.argv[2]})",
        str(script.parent),
        str(saved),
    )
    assert submitted.returncode == 0, submitted.stderr
    log = _wait_for_log(machine, "5.0")
    assert f"{addresses['ray_address']} {addresses['mlflow_url']} 5.0" in log

    status = json.loads(machine.tandem_cluster("status", "--json").stdout)
    assert status["mlflow_answers"] is True
    assert [(node["total_cpus"], node["is_head"]) for node in status["nodes"]] == [(3, True), (2, False)]
    assert len({node["address"] for node in status["nodes"]}) == 2
    assert [job["submission_id"] for job in status["jobs"]] == ["e2e"]
    assert status["mlflow_refuses_name"] is False
    machines = [status["vitals"][node["node_id"]] for node in status["nodes"]]
    assert all(0 < one["disk_free_bytes"] <= one["disk_bytes"] and -3 < one["age_s"] < 60 for one in machines)
    (kept,) = status["supervisors"]
    assert (kept["number"], kept["state"], kept["returns"]) == (1, "up", 0)
    assert "$ " in Path(kept["log"]).read_text()

    down = machine.tandem_cluster("down")
    assert down.returncode == 0, down.stderr
    assert machine.processes() == []
    assert saved.read_text() == "saved"
    assert machine.tandem_cluster("status").returncode == 3
    assert machine.tandem_cluster("down").stderr.strip() == "nothing to stop"


def _wait_for_log(machine: Machine, text: str) -> str:
    deadline = time.monotonic() + 60
    log = ""
    while text not in log and time.monotonic() < deadline:
        found = [path.read_text() for path in machine.home.glob("ray/session_2*/logs/job-driver-e2e.log")]
        log = "".join(found)
        time.sleep(0.2)
    return log


def test_job_without_the_token_is_refused(cluster: Connection) -> None:
    job = json.dumps({"entrypoint": "touch /tmp/intruder"}).encode()
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        request = urllib.request.Request(f"{cluster.jobs_address}/api/jobs/", job, headers)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request)
        assert refused.value.code in (401, 403)


def test_wrong_token_is_explained(cluster: Connection, tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.env |= {"RAY_ADDRESS": cluster.jobs_address, "MLFLOW_TRACKING_URI": cluster.tracking_uri}
    machine.env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "wrong"}
    refused = machine.tandem_cluster("status")
    assert refused.returncode != 0
    assert "refused the token" in refused.stderr


def test_token_is_found_by_a_process_that_used_ray_before(cluster: Connection) -> None:
    machine = Machine(Path(os.environ["TANDEM_HOME"]))
    code = """
from ray.job_submission import JobSubmissionClient
try:
    JobSubmissionClient("http://127.0.0.1:1")  # no token yet: Ray remembers that it needs none
except ConnectionError:
    pass
from cluster.connect import init_ray, job_client
import ray
job_client().list_jobs()
init_ray()
print(ray.cluster_resources()["CPU"])
"""
    found = machine.python(code)
    assert found.stdout.strip() == "4.0", found.stderr


def test_ports_and_nodes_of_the_session_cluster(cluster: Connection) -> None:
    nodes = topology.nodes()
    assert [(node.is_head, node.alive, node.total_cpus) for node in nodes] == [(True, True, 4.0)]
    assert nodes[0].address.startswith("127.")
    assert 0 <= nodes[0].free_cpus <= 4
    assert nodes[0].memory_bytes > 0
    connect.init_ray()
    (own,) = topology.own_nodes()
    assert 0 <= own.free_cpus <= 4
    assert replace(own, free_cpus=nodes[0].free_cpus) == nodes[0], "the same without the dashboard"
    port = int(cluster.tracking_uri.rsplit(":", 1)[1])
    state = local.state()
    assert state is not None
    assert state.mlflow_url.endswith(str(port))


def test_code_and_home_travel_with_jobs(cluster: Connection, tmp_path: Path) -> None:
    shipped = connect.runtime_env(tmp_path, {"X": "1"})
    home = os.environ["TANDEM_HOME"]
    assert shipped["env_vars"] == {"MLFLOW_TRACKING_URI": cluster.tracking_uri, "TANDEM_HOME": home, "X": "1"}
    assert {Path(folder).name for folder in shipped["py_modules"]} == {"cluster", "jobs", "serve", "tracking"}


def test_second_job_of_the_same_id_is_refused(cluster: Connection) -> None:
    assert connect.submit("true", submission_id="twice") == "twice"
    with pytest.raises(UserError, match="already has a job 'twice'"):
        connect.submit("true", submission_id="twice")


def test_busy_explicit_port_starts_nothing(machine: Machine, cluster: Connection) -> None:
    port = cluster.tracking_uri.rsplit(":", 1)[1]
    refused = machine.tandem_cluster("up", "--mlflow-port", port)
    assert refused.returncode != 0
    assert f"port {port} for MLflow is in use by python" in refused.stderr
    assert machine.processes() == []
