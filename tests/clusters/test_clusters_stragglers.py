"""A node is slow: it is told by name while the run goes on, and left out where the spec says so."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from cluster import home, topology
from jobs.run_folder import RunFolder
from tests.support.fault_runs import ended, run, same_curve, submitted, wait_for, wait_for_folder
from tests.support.own_cluster import own_cluster

STEPS = 500
RATE = ["training.learning_rate=3e-4", "training.schedule=constant", f"training.steps={STEPS}"]
PACED = ";".join(f"pace:rank={rank}:step=1" for rank in range(3))
"""Every rank takes a tenth of a second longer for each step, so that the run lasts."""
STOPPED_S, RUNS_S = 0.2, 0.1


@dataclass
class Slowed:
    """The proof that a process was slowed down."""

    stops: int = 0
    """How often the kernel said that it was stopped."""


@contextmanager
def slowed(process: psutil.Process) -> Iterator[Slowed]:
    """Stop a process for two thirds of its time, as long as it lives or until the end."""
    proof, over = Slowed(), threading.Event()

    def stutter() -> None:
        with suppress(psutil.NoSuchProcess):
            while not over.is_set():
                process.suspend()
                time.sleep(STOPPED_S)
                proof.stops += process.status() == psutil.STATUS_STOPPED
                process.resume()
                time.sleep(RUNS_S)

    thread = threading.Thread(target=stutter)
    thread.start()
    try:
        yield proof
    finally:
        over.set()
        thread.join()
        with suppress(psutil.NoSuchProcess):
            process.resume()


@pytest.fixture(scope="module")
def three_nodes():
    """A cluster of three nodes of one CPU each, in a home of its own."""
    with own_cluster(nodes=2, cpus=1, cpus_per_node=1) as started:
        yield started


@pytest.fixture
def storage(three_nodes):
    return home.home() / "storage"


@pytest.fixture(scope="module")
def steady(three_nodes, folder):
    """The losses of one worker, to which nothing happens."""
    found = run(folder, home.home() / "storage", "steady", *RATE, "resources.workers=1")
    assert found.status == "SUCCEEDED", found.log
    return found.losses()


def training(storage: Path, name: str, workers: int) -> RunFolder:
    """Return the folder of a run once so many workers train."""
    folder = RunFolder(wait_for_folder(storage, name))
    wait_for(lambda: (a := folder.attempt()) and a.training and a.workers == workers, f"{workers} workers", 120)
    return folder


def told(folder: RunFolder) -> list[str]:
    return [entry["said"] for entry in folder.paces.stragglers()]


def test_a_slow_node_is_told_by_name_and_left_out_where_the_spec_says_so(steady, storage, tmp_path):
    elastic = ["resources.workers={min: 1, max: 3, resize_every_s: 3}", "failures.straggler=exclude"]
    job = submitted(tmp_path, "excluding", *RATE, *elastic, "training.deepspeed.zero_stage=1", fault=PACED)
    folder = training(storage, "excluding", 3)
    before = folder.attempt()
    rank = next(rank for rank, node in enumerate(before.nodes) if node != topology.nodes()[0].node_id)
    began = time.monotonic()
    with slowed(psutil.Process(before.pids[rank])) as proof:
        wait_for(lambda: told(folder), "word of a straggler", 120)
        print(f"told after {time.monotonic() - began:.1f} s: {told(folder)[0]}")
        wait_for(lambda: folder.attempt().name != before.name and folder.attempt().training, "another start", 120)
        print(f"trains without it after {time.monotonic() - began:.1f} s")
    assert proof.stops > 10
    after = folder.attempt()
    assert before.nodes[rank] not in after.nodes
    assert after.workers == 2
    found = ended(job, storage, "excluding")
    assert found.status == "SUCCEEDED", found.log
    same_curve(found.losses(), steady)
    assert found.failures() == [], "nothing failed"
    node = next(node for node in topology.nodes() if node.node_id == before.nodes[rank])
    (line,) = [line for line in found.log if "is a straggler" in line]
    assert f"node {node.address} ({node.node_id[:8]}) is a straggler: rank {rank} of it took" in line
    assert "it is excluded" in line
    assert found.run.data.tags["tandem.straggler"] in line
    assert "## Slow nodes" in found.page()
    assert f"node {node.address}" in found.page()
    assert folder.control().excluded == (node.node_id,)


def test_of_two_the_slower_one_is_told_never_excluded_and_told_again_when_it_keeps_up(steady, storage, tmp_path):
    settings = ["resources.workers=2", "failures.straggler=exclude", "training.deepspeed.zero_stage=2"]
    job = submitted(tmp_path, "telling", *RATE, *settings, fault=PACED)
    folder = training(storage, "telling", 2)
    before = folder.attempt()
    with slowed(psutil.Process(before.pids[1])) as proof:
        wait_for(lambda: told(folder), "word of a straggler", 120)
    assert proof.stops > 10
    wait_for(lambda: len(told(folder)) > 1, "word that it is over", 120)
    found = ended(job, storage, "telling")
    assert found.status == "SUCCEEDED", found.log
    same_curve(found.losses(), steady)
    first, second = told(folder)
    assert "rank 1 of it" in first
    assert "it is not excluded: most of at least three nodes" in first
    assert "keeps up with the others again" in second
    assert folder.attempt().name == before.name, "the group went on"
    assert [line for line in found.log if "keeps up with" in line]


def test_a_run_in_which_all_are_equally_fast_says_nothing(steady, storage, tmp_path):
    found = run(tmp_path, storage, "even", *RATE, "resources.workers=3", fault=PACED)
    assert found.status == "SUCCEEDED", found.log
    same_curve(found.losses(), steady)
    windows = [json.loads(path.read_text())["window"] for path in (found.folder / "paces").glob("*-rank-*")]
    assert len(windows) == 3
    assert min(windows) >= 3, "it was compared"
    assert told(RunFolder(found.folder)) == []
