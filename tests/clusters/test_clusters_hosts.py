"""Four hosts that share no folder: what is kept in an object store is enough, and a folder that is not shared is told.

The hosts are namespaces of this machine (tests/support/hosts.py), the store is moto's S3 server on a fifth.
"""

from __future__ import annotations

import itertools
import json
import re
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from tests.support import hosts, hosts_cluster, hosts_store
from tests.support.fault_runs import SPEC
from tests.support.hosts import Host
from tests.support.hosts_store import Job, Site
from tracking import outbox

STEPS = 120
PACED = "pace:rank=0:step=1"
"""A tenth of a second a step: time for a fault."""


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    hosts.need()
    with hosts_store.up(4) as found:
        yield found


def spec(site: Site, name: str, **more: Any) -> dict[str, Any]:
    training = {**SPEC["training"], "steps": STEPS}
    return {**SPEC, "name": name, "training": training, "resources": {"workers": 3}, "storage": site.storage, **more}


@pytest.fixture(scope="module")
def whole(site: Site) -> Job:
    """A run that nothing happened to."""
    found = site.job(spec(site, "whole", register={"model": "of-a-store", "alias": "staging"}))
    assert found.code == 0, found.log[-4000:]
    return found


def test_a_folder_that_each_node_has_of_its_own_is_refused_before_anything_starts(site: Site) -> None:
    found = site.job({**spec(site, "no-share"), "storage": "/root/own"})
    assert found.code == 2
    others = f"{site.hosts[1].address}, {site.hosts[2].address}"
    assert f"storage: /root/own is not one folder that all nodes reach: nodes {others}: there is no such" in found.log
    assert "set storage to an object store such as s3://" in found.log
    assert "reading the data" not in found.log
    assert "\ntandem: run " not in found.log
    assert not list(site.hosts[0].path("/root/own").glob(".tandem*")), "what it was tried with is gone"


def test_a_run_over_an_object_store_needs_no_shared_folder(site: Site, whole: Job) -> None:
    stored = site.objects(f"runs/{whole.run}/")
    names = [name.removeprefix(f"runs/{whole.run}/") for name in stored]
    assert json.loads(site.read(f"runs/{whole.run}/status.json")) == {"status": "FINISHED"}
    assert {"evaluations.json", "spool/rank-0.jsonl", "spool/system-node-2.jsonl"} <= set(names)
    assert sum(name.startswith("checkpoints/step-00000120/") for name in names) == 4, "three shards and a manifest"
    assert len([name for name in names if name.startswith("logs/")]) == 3, "what each rank printed, on its own host"
    assert sorted(site.losses(whole.run)) == list(range(1, STEPS + 1))
    weights = site.objects(f"models/{whole.run}/")
    assert [name.rpartition("/")[2] for name in weights] == ["model.safetensors"]
    for host in site.hosts:
        (data,) = host.path("/root/home/stores").glob("*/data/*/train-00000.arrow")
        assert data.stat().st_size
    assert not list(site.hosts[1].path("/root/home/stores").glob("*/runs/*/*.safetensors"))


def test_a_run_goes_on_elsewhere_when_its_driver_was_killed_and_nothing_of_it_is_on_a_disk(
    site: Site, whole: Job
) -> None:
    """Another home stands for other machines: what they have of the run is what is stored."""
    begun = site.follow(spec(site, "moved"), fault=PACED)
    begun.until_step(40)
    (owner,) = site.hosts[0].path("/root/home/stores").glob(f"*/runs/moved-*/spool/{outbox.OWNER}")
    site.hosts[0].run("kill", "-9", str(json.loads(owner.read_text())["pid"]))
    killed = begun.end()
    assert killed.code == 1
    run = owner.parents[1].name
    wait_until(lambda: json.loads(site.read(f"runs/{run}/status.json")) == {"status": "FAILED"})
    again = site.job(spec(site, "moved"), home="/root/other")
    assert again.code == 0, again.log[-4000:]
    assert f"run {run} goes on in s3://bucket/tandem/runs/{run}" in again.log
    assert "(encoded before)" in again.log
    same_losses(site, again, whole)


@pytest.mark.parametrize(
    ("seconds", "workers"),
    [
        pytest.param(5, 3, id="5 s"),
        pytest.param(20, 4, id="20 s, no spare"),
        pytest.param(20, 3, id="20 s, a spare"),
        pytest.param(60, 4, id="60 s, no spare"),
        pytest.param(60, 3, id="60 s, a spare"),
    ],
)
def test_a_host_is_cut_off_while_it_trains(site: Site, whole: Job, seconds: int, workers: int) -> None:
    """A short cut costs nothing; a long one a start of the group: on a spare host, or once the node has come back."""
    begun = site.follow(spec(site, f"cut-{seconds}-{workers}", resources={"workers": workers}), fault=PACED)
    begun.until_step(40)
    cut_off = next(host for host in reversed(site.hosts) if ranks_on(host))
    pids = ranks_on(cut_off)
    site.links.cut(cut_off)
    cut_at = time.time()
    mend = threading.Timer(seconds, site.links.mend, [cut_off])
    mend.start()
    found = begun.end()
    mend.join()
    assert found.code == 0, found.log[-4000:]
    attempts = {name.rpartition("/")[2].partition("-")[0] for name in site.objects(f"runs/{found.run}/logs/")}
    assert (len(attempts) > 1) is (seconds > 10)
    if seconds > 10:
        (at,) = map(int, re.findall(r"^tandem: node lost .* after step (\d+) ", found.log, re.MULTILINE))
        assert at < STEPS, "it was cut off while it trained"
        wait_until(lambda: not pids & ranks_on(cut_off))
    print(f"{len(attempts)} starts of the group; {cost(site.times(found.run), cut_at)}")
    same_losses(site, found, whole)


def test_the_heads_host_loses_its_power_and_is_started_again_on_its_disk(site: Site, whole: Job) -> None:
    """The other nodes join again by themselves, MLflow has its runs, and the job goes on where it was saved."""
    head = site.hosts[0]
    begun = site.follow(spec(site, "headless"), fault=PACED)
    begun.until_step(40)
    (folder,) = head.path("/root/home/stores").glob("*/runs/headless-*")
    old = {pid for host in site.hosts[1:] for pid in ranks_on(host)}
    site.links.lose(head)
    wait_until(lambda: not begun.is_running)
    site.links.mend(head)
    hosts_cluster.start_head(site.cluster)
    wait_until(lambda: len(alive(site)) == len(site.hosts), 120)
    assert not old & {pid for host in site.hosts[1:] for pid in ranks_on(host)}, "nothing of before trains on"
    again = site.job(spec(site, "headless"))
    assert again.code == 0, again.log[-4000:]
    assert f"run {folder.name} goes on in" in again.log
    same_losses(site, again, whole)
    assert again.result["run_url"].startswith("http://host1:5000/"), "MLflow on its name"


def ranks_on(host: Host) -> set[str]:
    """Return the pids of training workers of a host."""
    return set(host.run("pgrep", "-f", "^ray::.*RayTrainWorker", check=False).stdout.split())


def alive(site: Site) -> list[str]:
    """Return the addresses of the nodes that Ray takes to be alive."""
    nodes = json.loads(site.tandem("cluster", "status", "--json"))["nodes"]
    return [node["address"] for node in nodes if node["alive"]]


def cost(times: Sequence[tuple[int, float]], cut_at: float) -> str:
    """Say what a cut has cost: work that was done twice, and how long none was done."""
    done = sorted(at for _, at in times)
    twice = len(times) - len({step for step, _ in times})
    pace = statistics.median(b - a for a, b in itertools.pairwise(done))
    pause, ended = max((b - a, b) for a, b in itertools.pairwise(done) if b > cut_at)
    again = f"{twice} steps done again ({twice * pace:.1f} s of training)"
    return f"{again}; stood {pause:.1f} s, on again {ended - cut_at:.1f} s after the cut"


def same_losses(site: Site, found: Job, whole: Job) -> None:
    losses = site.losses(found.run)
    assert sorted(losses) == list(range(1, STEPS + 1))
    assert losses == pytest.approx(site.losses(whole.run), rel=1e-5)


def wait_until(holds: Callable[[], bool], timeout_s: float = 60) -> None:
    enough = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < enough
        time.sleep(0.5)
