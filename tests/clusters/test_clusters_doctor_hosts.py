"""`tandem doctor` on three hosts by namespaces, each with one thing wrong, and what it has jobs do about it.

A wrong clock is not among them: namespaces do not shift the time of day (tests/unit/test_cluster_doctor.py judges one).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support import hosts, hosts_cluster
from tests.support.fault_runs import SPEC
from tests.support.hosts import NETWORK, Host, Hosts
from tests.support.hosts_cluster import Cluster
from tests.support.waiting import wait_for

RUNS = "/shared/runs"
GLOO = """
import datetime, sys
import torch.distributed as dist
rank, address, port = int(sys.argv[1]), sys.argv[2], sys.argv[3]
limit = datetime.timedelta(seconds=20)
dist.init_process_group("gloo", init_method=f"tcp://{address}:{port}", rank=rank, world_size=2, timeout=limit)
dist.barrier()
print("met")
"""


@pytest.fixture(scope="module")
def three() -> Iterator[Hosts]:
    hosts.need()
    with hosts.up(3) as made:
        yield made


@pytest.fixture(scope="module")
def ray_over(three: Hosts) -> Cluster:
    return hosts_cluster.start(three)


def examined(cluster: Cluster, *options: str, env: dict[str, str] | None = None) -> tuple[int, dict[str, Any]]:
    """Run the doctor on the head; return its exit code and what it printed as JSON."""
    done = cluster.tandem("doctor", "--json", *options, env=env, check=False)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def found(said: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [finding for finding in said["findings"] if finding["kind"] == kind]


@contextmanager
def hosts_files(members: list[Host], first: str) -> Iterator[None]:
    """Put a line before what /etc/hosts has on some hosts; `{name}` in it is the host's own."""
    before = [host.path("/etc/hosts").read_text() for host in members]
    try:
        for host, text in zip(members, before, strict=True):
            host.write_hosts_file(f"{first.format(name=host.name)}\n{text}")
        yield
    finally:
        for host, text in zip(members, before, strict=True):
            host.write_hosts_file(text)


def left_behind(three: Hosts) -> list[str]:
    """List the probes' processes and files that are still there, and the folder that was made for them."""
    files = "find /tmp /root /shared -name '.tandem-doctor-*' -o -path /shared/runs -o -path /root/runs"
    script = f"ps ax -o args | grep '[P]robe'; {files}"
    said = [(host.name, host.run("sh", "-c", script, check=False).stdout) for host in three]
    return [f"{name}: {line}" for name, text in said for line in text.splitlines()]


def nothing_stays(three: Hosts) -> None:
    """Wait for the probes' processes to end, which were killed and take a moment for it."""
    wait_for(lambda: not left_behind(three), "the doctor leaves something behind")


def test_three_sound_hosts(three: Hosts, ray_over: Cluster) -> None:
    code, said = examined(ray_over, "--storage", RUNS)
    assert [finding for finding in said["findings"] if finding["severity"] == "error"] == []
    assert code == 0
    assert {node["host"]: node["address"] for node in said["nodes"]} == {host.name: host.address for host in three}
    assert all(node["mlflow"]["status"] == 200 for node in said["nodes"])
    assert all(node["interface"]["gloo"] == "eth0" for node in said["nodes"])
    assert all(abs(node["clock"]["offset_s"]) <= node["clock"]["error_s"] + 0.1 for node in said["nodes"])
    assert len(said["links"]) == 6
    assert all(link["bytes_per_s"] > 0 for link in said["links"])
    assert said["allreduce"]["error"] == ""
    assert said["allreduce"]["bus_bytes_per_s"] > 0
    assert len(said["storage"]["asked"]) == 3
    nothing_stays(three)


def test_a_slow_host_is_named(three: Hosts, ray_over: Cluster) -> None:
    three.slow(three[2], "20mbit")
    try:
        code, said = examined(ray_over, "--storage", RUNS)
    finally:
        three.fast(three[2])
    assert code == 1
    (finding,) = [one for one in found(said, "network") if one["severity"] == "error"]
    assert finding["node"] == f"host3 ({NETWORK}.3)"
    slow = [link["bytes_per_s"] for link in said["links"] if _third(said) in (link["source"], link["target"])]
    assert max(slow) < 20e6 / 8 * 1.1, "no more than tbf lets pass"


def _third(said: dict[str, Any]) -> str:
    return str(next(node["node_id"] for node in said["nodes"] if node["host"] == "host3"))


def test_a_folder_that_is_not_shared_is_named(three: Hosts, ray_over: Cluster) -> None:
    code, said = examined(ray_over, "--quick", "--storage", "/root/runs")
    assert code == 1
    (finding,) = found(said, "storage")
    assert finding["what"].startswith("/root/runs is not shared")
    nothing_stays(three)


def test_the_one_host_without_the_share_is_named(three: Hosts, ray_over: Cluster) -> None:
    three[0].path("/shared/apart").mkdir()
    three[2].run("mount", "-t", "tmpfs", "apart", "/shared/apart")
    try:
        code, said = examined(ray_over, "--quick", "--storage", "/shared/apart")
    finally:
        three[2].run("umount", "/shared/apart")
        three[0].path("/shared/apart").rmdir()  # fails if something is left in it
    assert code == 1
    (finding,) = found(said, "storage")
    assert finding["node"] == f"host3 ({NETWORK}.3)"


def test_a_name_that_mlflow_refuses_is_named_with_the_way_out(three: Hosts, ray_over: Cluster) -> None:
    with hosts_files(list(three), f"{NETWORK}.1 tracker.example"):
        where = {"MLFLOW_TRACKING_URI": "http://tracker.example:5000"}
        code, said = examined(ray_over, "--quick", "--storage", RUNS, env=where)
    assert code == 1
    (finding,) = found(said, "mlflow")
    assert finding["node"] == "every node"
    assert "refuses the name tracker.example:5000 (403" in finding["what"]
    assert "--allowed-hosts" in finding["way_out"]


def _meet(three: Hosts, port: int, env: dict[str, str]) -> list[tuple[int, str]]:
    """Make a gloo group of two hosts; return exit codes and what was printed to standard error."""
    command = [sys.executable, "-c", GLOO]
    started = [three[rank].start(*command, str(rank), three[0].address, str(port), env=env) for rank in (0, 1)]
    try:
        said = [process.communicate(timeout=120)[1] for process in started]
    finally:
        for process in started:
            hosts.end(process)
    return [(process.returncode, text) for process, text in zip(started, said, strict=True)]


def test_debians_habit_is_named_and_training_over_hosts_works(three: Hosts, ray_over: Cluster) -> None:
    """The fault is real, for who sets no interface, and jobs of Tandem's are not affected by it."""
    with hosts_files(list(three), "127.0.1.1 {name}"):
        plain, told = _meet(three, 29600, {}), _meet(three, 29601, {"GLOO_SOCKET_IFNAME": "eth0"})
        code, said = examined(ray_over, "--quick", "--storage", RUNS)
        log = trained(three, ray_over, "debian")
    assert all(code != 0 and "connectFullMesh" in text for code, text in plain), plain
    assert [code for code, _ in told] == [0, 0], told
    assert code == 0
    assert {finding["node"] for finding in found(said, "names")} == {
        f"host{number} ({NETWORK}.{number})" for number in (1, 2, 3)
    }
    assert "finished" in log


def trained(three: Hosts, cluster: Cluster, name: str, check: bool = True) -> str:
    """Submit the small job for one worker on each host, and follow it; return its log."""
    spec = {**SPEC, "name": name, "storage": RUNS, "resources": {"workers": 3}}
    spec["training"] = {**SPEC["training"], "steps": 6}
    three[0].path(f"/root/{name}.yaml").write_text(yaml.safe_dump(spec))
    done = cluster.tandem("jobs", "submit", f"/root/{name}.yaml", "--follow", "--verbose", check=False, timeout_s=400)
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
        assert places(three, name) == 3, "one rank on each host"
    return f"{done.returncode}\n{done.stdout}{done.stderr}"


def places(three: Hosts, name: str) -> int:
    """Count the nodes on which the ranks of a run's last attempt were."""
    (note,) = three[0].path(RUNS).glob(f"**/{name}*/attempt.json")
    return len(set(json.loads(Path(note).read_text())["nodes"]))


def test_a_host_with_another_torch_is_named_and_a_job_that_spans_it_is_refused(three: Hosts, ray_over: Cluster) -> None:
    """What is installed is what packages say of themselves: one that says otherwise lies before the others' there."""
    three[2].run("sh", "-c", "mkdir -p /root/other/torch-2.12.0.dist-info")
    three[2].path("/root/other/torch-2.12.0.dist-info/METADATA").write_text("Name: torch\nVersion: 2.12.0\n")
    hosts_cluster.stop_ray(three[2])
    hosts_cluster.start_worker(three[2], ray_over, env={"PYTHONPATH": f"/root/other:{hosts.PROJECT}"})
    code, said = examined(ray_over, "--quick", "--storage", RUNS)
    assert code == 1
    (finding,) = found(said, "versions")
    assert finding["node"] == f"host3 ({NETWORK}.3)"
    assert "has torch 2.12.0" in finding["what"]
    log = trained(three, ray_over, "mismatched", check=False)
    assert log.startswith("2\n"), log
    assert "host3" in log
    assert "has torch 2.12.0" in log
    assert "train 1/6" not in log
