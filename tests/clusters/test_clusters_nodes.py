"""Hosts are cut off and come back: what is noticed, what goes on, and who joins again without anybody's hand."""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.ray_process_internals import HEALTH_CHECK
from tests.support import hosts
from tests.support.fault_runs import wait_for
from tests.support.hosts import Host, Hosts

PORT = 6379
ENVIRONMENT = {
    **HEALTH_CHECK,
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
    "RAY_USAGE_STATS_ENABLED": "0",
}
LIMITS = ("--num-cpus=1", f"--object-store-memory={100 * 1024**2}", "--disable-usage-stats")
WATCH = """
import json, sys, time
import ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
before = None
while True:
    alive = sorted([n["NodeManagerAddress"], n["NodeID"], n["Labels"].get("tandem-returns", "")]
                   for n in ray.nodes() if n["Alive"])
    if alive != before:
        print(json.dumps({"at": time.time(), "alive": alive}), flush=True)
    before = alive
    time.sleep(0.1)
"""
WRITER = """
import os, sys, time
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")

@ray.remote(num_cpus=0)
class Writer:
    def run(self):
        with open("/tmp/writes", "a") as file:
            while True:
                print(f"{os.getpid()} {time.time()}", file=file, flush=True)
                time.sleep(0.1)

writer = Writer.options(scheduling_strategy=NodeAffinitySchedulingStrategy(sys.argv[2], soft=False)).remote()
reference = writer.run.remote()
print("asked", flush=True)
time.sleep(3600)
"""
ONE_TASK = """
import sys
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
there = NodeAffinitySchedulingStrategy(sys.argv[2], soft=False)
print(ray.get(ray.remote(num_cpus=0)(lambda: "done").options(scheduling_strategy=there).remote(), timeout=60))
"""


@dataclass
class Cluster:
    """Ray on three hosts, the first one being the head, started as ray-cluster.yaml does it."""

    hosts: Hosts
    seen: Path
    """What the head says of who is alive, a line for each change."""

    @property
    def address(self) -> str:
        return f"{self.hosts[0].address}:{PORT}"

    def changes(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.seen.read_text().splitlines() if line.startswith("{")]

    def alive(self) -> dict[str, tuple[str, str]]:
        """Address → (node id, how often it has joined again), as the head says it now."""
        return {address: (node, returns) for address, node, returns in self.changes()[-1]["alive"]}

    def start(self, host: Host) -> None:
        supervisor = [sys.executable, "-m", "cluster.supervisor"]
        ray = ["ray", "start", f"--address={self.address}", f"--node-ip-address={host.address}", *LIMITS]
        host.run(*supervisor, "start", "--address", self.address, "--", *ray, env=ENVIRONMENT)

    def supervisor(self, host: Host) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(host.path("/root/.tandem/node/supervisor.json").read_text())
        return found

    def log(self, host: Host) -> str:
        return host.path("/root/.tandem/node/supervisor.log").read_text()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    hosts.need()
    seen = tmp_path_factory.mktemp("nodes") / "seen"
    with hosts.up(3) as three:
        made = Cluster(three, seen)
        head = ["ray", "start", "--head", f"--node-ip-address={three[0].address}", f"--port={PORT}"]
        three[0].run(*head, "--include-dashboard=false", *LIMITS, env=ENVIRONMENT)
        watch = three[0].start(sys.executable, "-c", WATCH, made.address, env=ENVIRONMENT, log=seen)
        hosts.wait_for_text(seen, "alive", watch)
        for host in three[1:]:
            made.start(host)
        wait_for(lambda: len(made.alive()) == 3, "three nodes", 60)
        yield made
        hosts.end(watch)


def test_a_short_cut_passes(cluster: Cluster) -> None:
    host = cluster.hosts[1]
    before = cluster.alive()[host.address]
    cluster.hosts.cut(host)
    time.sleep(5)  # the fault
    cluster.hosts.mend(host)
    assert "done" in cluster.hosts[0].python(ONE_TASK, cluster.address, before[0], env=ENVIRONMENT)
    assert cluster.alive()[host.address] == before


def test_a_host_that_was_cut_off_joins_again_by_itself_and_what_ran_there_is_over(cluster: Cluster) -> None:
    host = cluster.hosts[2]
    before, _ = cluster.alive()[host.address]
    writes = host.path("/tmp/writes")
    writer = cluster.hosts[0].start(sys.executable, "-c", WRITER, cluster.address, before, env=ENVIRONMENT)
    wait_for(writes.exists, "write on that host", 60)
    old_pid = writes.read_text().split()[0]
    cluster.hosts.cut(host)
    cut_at = time.time()
    wait_for(lambda: host.address not in cluster.alive(), "death", 60)
    dead_after_s = cluster.changes()[-1]["at"] - cut_at
    time.sleep(max(0.0, cut_at + 20 - time.time()))  # the fault
    cluster.hosts.mend(host)
    mended_at = time.time()
    wait_for(lambda: host.address in cluster.alive(), "return", 90)
    back_after_s = cluster.changes()[-1]["at"] - mended_at
    print(f"declared dead {dead_after_s:.1f} s after the cut; back {back_after_s:.1f} s after it was mended")
    after, returns = cluster.alive()[host.address]
    assert after != before
    assert returns == "1"
    print("\n".join(line for line in cluster.log(host).splitlines() if line.startswith("20")))
    assert "declared dead" in cluster.log(host)
    wait_for(lambda: cluster.supervisor(host)["returns"] == 1, "note of the supervisor", 30)
    assert not host.path(f"/proc/{old_pid}").exists(), "its process is gone"
    last = float(writes.read_text().split()[-1])
    assert last < cluster.changes()[-1]["at"], "it wrote nothing beside the new raylet"
    assert "done" in cluster.hosts[0].python(ONE_TASK, cluster.address, after, env=ENVIRONMENT)
    hosts.end(writer)


def test_starting_a_node_again_replaces_its_supervisor(cluster: Cluster) -> None:
    host = cluster.hosts[2]
    before = cluster.supervisor(host)
    host.run(sys.executable, "-m", "cluster.supervisor", "stop")
    host.run("ray", "stop")
    cluster.start(host)
    after = cluster.supervisor(host)
    assert after["pid"] != before["pid"]
    assert not host.path(f"/proc/{before['pid']}").exists()
    assert (after["state"], after["returns"]) == ("up", 0)
    wait_for(lambda: len(cluster.alive()) == 3, "three nodes", 60)
    assert "0" not in cluster.alive()[host.address][1]


def test_a_stop_that_was_asked_for_is_no_death(cluster: Cluster) -> None:
    host = cluster.hosts[1]
    host.run("ray", "stop")
    wait_for(lambda: cluster.supervisor(host)["state"] == "ended", "end of the supervisor", 30)
    assert cluster.supervisor(host)["reason"] == "its raylet was asked to stop"
    wait_for(lambda: host.address not in cluster.alive(), "leave", 30)
    assert not host.path(f"/proc/{cluster.supervisor(host)['pid']}").exists()


def test_a_node_that_cannot_start_says_why_and_leaves_nobody_behind(cluster: Cluster) -> None:
    host = cluster.hosts[1]
    command = ["-m", "cluster.supervisor", "start", "--address", "10.77.0.99:1", "--folder", "/tmp/none", "--", "ray"]
    done = host.run(sys.executable, *command, "no-such-command", env=ENVIRONMENT, check=False)
    assert done.returncode == 1
    assert "did not start" in done.stderr
    assert "no-such-command" in done.stderr
    state = json.loads(host.path("/tmp/none/supervisor.json").read_text())
    assert not host.path(f"/proc/{state['pid']}").exists()
