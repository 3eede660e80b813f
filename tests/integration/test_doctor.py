"""`tandem doctor` on the embedded cluster: three nodes on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import daemons, home
from cluster.doctor import mlflow_probe
from tests.support.mlflow_server import MlflowServer
from tests.support.own_cluster import own_cluster

ROOT = Path(__file__).parents[2]


def doctor(*options: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tandem", "doctor", *options]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **env}
    return subprocess.run(command, capture_output=True, text=True, env=variables, timeout=240)


@pytest.fixture(scope="module")
def three_nodes() -> Iterator[None]:
    with own_cluster(nodes=2, cpus=1):
        yield


def said(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


@pytest.mark.usefixtures("three_nodes")
def test_three_nodes_of_one_machine_have_nothing_that_a_job_would_fail_by() -> None:
    done = doctor("--json")
    found = said(done)
    assert [finding for finding in found["findings"] if finding["severity"] == "error"] == []
    assert done.returncode == 0
    assert [node["address"] for node in found["nodes"]] == [daemons.loopback_address(number) for number in range(3)]
    assert all(node["mlflow"]["status"] == 200 for node in found["nodes"])
    assert len({node["versions"]["tandem's code"] for node in found["nodes"]}) == 1
    assert len(found["links"]) == 6
    assert all(link["bytes_per_s"] > 0 for link in found["links"])
    assert found["allreduce"]["error"] == ""
    assert found["storage"]["place"] == str(home.home() / "storage")
    assert (found["storage"]["not_read"], found["storage"]["not_written"], found["storage"]["left"]) == ({}, {}, {})
    assert not (home.home() / "storage").exists(), "what was made is removed again"
    assert "round 3 of 3" in done.stderr, "it shows how far it is"


@pytest.mark.usefixtures("three_nodes")
def test_the_table_is_for_people_and_quick_says_what_it_leaves_out() -> None:
    done = doctor("--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if "127.0.0." in line]
    assert len(rows) == 3
    assert all("answers" in row and "shared" in row for row in rows)
    assert "left out by --quick" in done.stdout
    assert done.stdout.rstrip().splitlines()[-1].startswith("3 nodes: ")


@pytest.mark.usefixtures("three_nodes")
def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for place in (str(file / "runs"), "nosuch://bucket/runs"):
        done = doctor("--quick", "--json", "--storage", place)
        (finding,) = [one for one in said(done)["findings"] if one["kind"] == "storage"]
        assert done.returncode == 1
        assert (finding["severity"], finding["node"]) == ("error", "every node")
        assert finding["what"].startswith(f"cannot write into {place}: ")


@pytest.mark.usefixtures("three_nodes")
def test_an_mlflow_that_is_not_there_is_an_error() -> None:
    done = doctor("--quick", "--json", MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    (finding,) = [one for one in said(done)["findings"] if one["kind"] == "mlflow"]
    assert done.returncode == 1
    assert finding["severity"] == "error"


@pytest.mark.parametrize(("name", "status"), [("0x7f000001", 403), ("127.0.0.1", 200)])
def test_mlflows_host_check_is_met_as_a_job_would_meet_it(tmp_path: Path, name: str, status: int) -> None:
    """The first name is this machine's address as nobody writes it: it is reached by it, and was not told so."""
    server = MlflowServer(tmp_path).start()
    url = server.url.replace("127.0.0.1", name)
    try:
        answer = mlflow_probe.asked({"MLFLOW_TRACKING_URI": url})
    finally:
        server.kill()
    assert answer.status == status
    assert ("Invalid Host header" in answer.text) == (status == 403)
    assert mlflow_probe.asked({"MLFLOW_TRACKING_URI": url}).status == 0, "it has ended"


def test_without_a_cluster_it_could_not_look(tmp_path: Path) -> None:
    done = doctor(TANDEM_HOME=str(tmp_path), RAY_ADDRESS="", MLFLOW_TRACKING_URI="")
    assert done.returncode == 2
    assert "tandem cluster up" in done.stderr


def test_a_wrong_call_is_2() -> None:
    assert doctor("--deep").returncode == 2
