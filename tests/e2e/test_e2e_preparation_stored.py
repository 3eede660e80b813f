"""Nodes prepare through an object store what one process prepares, and what they made outlives a kill."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.checkpoint.store import Store
from jobs.data import stored
from tests.support import moto_server
from tests.support.moto_server import MotoServer
from tests.support.own_cluster import own_cluster
from tests.support.slow_preparation import HERE, ROOT, environment, lay_out, made

AWAY = re.compile(r"\.[0-9a-f]{16}\.away")


@pytest.fixture(scope="module")
def server() -> Iterator[MotoServer]:
    """A store, and a cluster of two nodes that have its credentials."""
    with pytest.MonkeyPatch.context() as patch, moto_server.running(patch) as found, own_cluster(nodes=1, cpus=1):
        yield found


@pytest.fixture
def base(server: MotoServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    lay_out(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "own_slow", raising=False)
    with server.client().open_output_stream("bucket/x.jsonl") as stream:  # type: ignore[attr-defined]
        stream.write((tmp_path / "x.jsonl").read_bytes())
    return tmp_path


def begun(base: Path, storage: str, uri: str, source: str, slow_s: float = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.support.slow_preparation", str(base), storage, "cluster", uri, source]
    env = {**environment(base), "SLOW_S": str(slow_s)}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, cwd=ROOT, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def ended(process: subprocess.Popen[str]) -> str:
    shown, _ = process.communicate(timeout=240)
    assert process.returncode == 0, shown
    return shown


def test_two_nodes_give_the_rows_of_one_process_and_leave_nothing_else(server: MotoServer, base: Path) -> None:
    uri = server.uri("bucket/whole")
    shown = ended(begun(base, "first", uri, server.uri("bucket/x.jsonl")))
    rows = made(base, "here", HERE).rows
    assert shown.split()[-2:] == ["cluster", rows]
    store = Store(uri)
    (name,) = store.folders("data")
    objects = store.tree(f"data/{name}")
    of_tasks = [each for each in objects if re.search(r"\.[0-9a-f]{12}\.arrow$", each)]
    assert len(of_tasks) > 10, "tasks have stored what they made"
    assert list((base / "first" / "data").glob(".*.away/*/*/*")), "the other node has worked, in a folder of its own"
    assert not list((base / "first" / "data").glob(".*.away/*/*/*/*.arrow")), "and keeps no rows"
    there = base / "third" / "data" / name
    assert stored.fetch(store, there)
    first = base / "first" / "data" / name
    assert {p.name: p.read_bytes() for p in there.glob("*.arrow")} == {
        p.name: p.read_bytes() for p in first.glob("*.arrow")
    }


def test_a_source_that_one_node_has_is_read_there_and_said(server: MotoServer, base: Path) -> None:
    """Both nodes of this cluster see the file; another test has hosts that do not (tests/clusters)."""
    shown = ended(begun(base, "disk", server.uri("bucket/disk"), "x.jsonl"))
    assert shown.split()[-2:] == ["cluster", made(base, "here", HERE).rows]


def test_another_machine_goes_on_from_what_a_killed_driver_left_in_the_store(server: MotoServer, base: Path) -> None:
    uri, source = server.uri("bucket/killed"), server.uri("bucket/x.jsonl")
    store = Store(uri)
    process = begun(base, "killed", uri, source, slow_s=0.1)
    try:
        until = time.monotonic() + 200
        while len(records := [name for name in store.tree("data") if "/finished/" in name]) < 6:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until
            time.sleep(0.1)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    shutil.rmtree(base / "killed")  # that machine is gone
    (name,) = (each for each in store.folders("data") if not each.endswith(".partial"))
    assert not stored.is_stored(store, name), "nothing takes what is not whole"
    shown = ended(begun(base, "other", uri, source))
    found = re.search(r"(\d+) files of rows were there", shown)
    assert found, shown
    assert int(found[1]) >= len(records)
    assert shown.split()[-2:] == ["cluster", made(base, "here", HERE).rows]
    assert [each for each in store.folders("data") if each.endswith(".partial")] == []
