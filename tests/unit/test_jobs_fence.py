"""A writer that was stopped and wakes up late neither replaces nor deletes what a newer attempt has committed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from jobs import lease
from jobs.checkpoint import catalog
from jobs.checkpoint.catalog import Keep, Manifest
from jobs.checkpoint.fence import Fence, Superseded
from jobs.checkpoint.saver import Saver
from jobs.checkpoint.shards import KINDS, Fragment, Reader
from jobs.checkpoint.store import Store
from jobs.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
LATE = """
import os, signal, sys, time
from jobs.checkpoint import saver
from jobs.checkpoint.catalog import Keep, Manifest
from jobs.checkpoint.fence import Fence
from jobs.checkpoint.store import Store
from tests.unit.test_jobs_fence import fragment
saver.RETRY_PAUSE_S = 0.01
root, stop_at, fails = sys.argv[1:]
store = Store(root)
fence = Fence.enter(store, "old")
stopped = []
def phase(name, step):
    if (name, step) == (stop_at, 20):
        if not stopped:
            stopped.append(step)
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(0.5)  # this thread may run on for a moment after the first one has stopped
        if fails:
            raise OSError(28, "No space left on device")
one = saver.Saver(store, "old", 0, 1, Keep(newest=1), phase, fence=fence)
for step in (10, 20):
    one.begin(Manifest(step, step, 1, 1), [fragment(1.0)], {"buffers.safetensors": b"old"})
    one.finish()
for outcome in one.outcomes():
    print(outcome.step, outcome.superseded, outcome.error, flush=True)
"""


def fragment(value: float) -> Fragment:
    return Fragment("w", 0, {kind: torch.full((1000,), value) for kind in KINDS})


def value_of(store: Store, manifest: Manifest) -> float:
    out = torch.zeros(1)
    names = [f"{catalog.folder(manifest.step)}/{name}" for name in manifest.shards]
    Reader(store, names).read("weight", "w", 999, out)
    return float(out)


CASES = {"commit": ("", "20 True Superseded: a newer attempt (new)"), "save": ("fails", "20 False OSError: [Errno 28]")}


@pytest.fixture(scope="module")
def late(tmp_path_factory):
    """By where it stops: a root, and a process that saves there. Both start at once: they import torch."""
    started = {}
    for stop_at, (fails, _) in CASES.items():
        root = tmp_path_factory.mktemp(stop_at)
        command = [sys.executable, "-c", LATE, str(root), stop_at, fails]
        started[stop_at] = root, subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    yield started
    for _, process in started.values():
        process.kill()
        process.communicate()


@pytest.mark.parametrize("stop_at", CASES)
def test_a_stopped_writer_wakes_up_behind_a_newer_one(late, stop_at):
    root, process = late[stop_at]
    store = Store(str(root))
    deadline = time.monotonic() + 60
    while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
        assert time.monotonic() < deadline, "it was stopped"
        time.sleep(0.02)
    newer = Saver(store, "new", 0, 1, Keep(newest=3), fence=Fence.enter(store, "new"))
    for step in (20, 30):
        newer.begin(Manifest(step, step, 1, 1), [fragment(2.0)], {"buffers.safetensors": b"new"})
        newer.finish()
    assert [outcome.error for outcome in newer.outcomes()] == [None, None]
    os.kill(process.pid, signal.SIGCONT)
    output = process.stdout.read()
    lines = [line for line in output.splitlines() if line[:2] in ("10", "20")]
    assert len(lines) == 2, output
    first, second = lines
    assert first == "10 False None", "before it was stopped"
    assert second.startswith(CASES[stop_at][1])
    assert catalog.steps(store) == [30, 20, 10]
    for step in (20, 30):
        manifest = catalog.read(store, step)
        assert isinstance(manifest, Manifest)
        assert catalog.verify(store, manifest) is None
        assert value_of(store, manifest) == 2.0
        assert store.read(f"{catalog.folder(step)}/{manifest.buffers}") == b"new"
        assert not [name for name in store.files(catalog.folder(step)) if name.startswith("old-")]


def test_the_newest_that_has_entered_may_commit_and_nobody_before(tmp_path):
    store = Store(f"file://{tmp_path}")
    fences = [Fence.enter(store, name) for name in ("a", "b", "c", "d")]
    assert [fence.number for fence in fences] == [1, 2, 3, 4]
    fences[-1].check()
    for fence in fences[:-1]:
        with pytest.raises(Superseded, match=r"a newer attempt \(d\)"):
            fence.check()
    assert store.files("attempts") == ["00000003-c", "00000004-d"]


def test_of_two_that_enter_with_one_number_one_goes_on(tmp_path):
    store = Store(str(tmp_path))
    first = Fence.enter(store, "a")
    store.write("attempts/00000001-b", [b"."])
    with pytest.raises(Superseded, match=r"a newer attempt \(b\)"):
        first.check()
    Fence(store, 1, "b").check()
    third = Fence.enter(store, "0")
    third.check()
    with pytest.raises(Superseded, match=r"a newer attempt \(0\)"):
        Fence(store, 1, "b").check()
    third.leave()
    Fence(store, 1, "b").check()


def test_a_save_whose_clearing_up_fails_is_a_save_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("jobs.checkpoint.saver.RETRY_PAUSE_S", 0.0)

    class Sticky(Store):
        def remove(self, folder: str) -> None:
            raise OSError(30, "Read-only file system")

    store = Sticky(str(tmp_path))
    one = Saver(store, "a", 0, 1, Keep(newest=1))
    for step in (10, 20):
        one.begin(Manifest(step, step, 1, 1), [fragment(1.0)])
        one.finish()
    assert [outcome.error for outcome in one.outcomes()] == [None, None]
    assert catalog.newest_valid(store)[0].step == 20


def test_a_file_that_could_not_be_written_whole_is_not_there(tmp_path):
    def chunks():
        yield b"half"
        raise OSError(28, "No space left on device")

    store = Store(str(tmp_path))
    store.write("f/x", [b"before"])
    with pytest.raises(OSError, match="No space"):
        store.write("f/x", chunks())
    assert store.files("f") == ["x"]
    assert store.read("f/x") == b"before"
    store.remove_files("f", "y")
    assert store.files("f") == ["x"]
    store.remove_files("f", "x")
    assert store.folders() == []


def test_workers_of_a_job_that_has_lost_its_run_shut_nobody_out(tmp_path):
    from jobs.worker.entry import enter  # heavy; the writers above import this module

    run, store = RunFolder(tmp_path, lease=1), Store(str(tmp_path / "checkpoints"))
    with lease.take(tmp_path).kept(lambda: None):
        assert enter(run, store, "first").number == 1
    with lease.take(tmp_path).kept(lambda: None):
        with pytest.raises(Superseded, match="another job has taken the run"):
            enter(run, store, "late")
        assert enter(RunFolder(tmp_path, lease=2), store, "second").number == 2


def test_one_that_sleeps_between_looking_and_writing_replaces_nothing(tmp_path):
    store = Store(str(tmp_path))

    class Drowsy(Fence):
        def check(self) -> None:
            super().check()
            catalog.commit(store, Manifest(10, 99, 1, 1, files), Fence.enter(store, "new"))

    files = {"x.safetensors": store.write(f"{catalog.folder(10)}/x.safetensors", [b"x"])}
    drowsy = Drowsy(store, Fence.enter(store, "old").number, "old")
    with pytest.raises(Superseded, match="a newer attempt has committed step 10"):
        catalog.commit(store, Manifest(10, 1, 1, 1, files), drowsy)
    assert catalog.read(store, 10).updates == 99
    assert store.files(catalog.folder(10)) == ["MANIFEST.json", "x.safetensors"]
    catalog.commit(store, Manifest(10, 100, 1, 1, files), Fence.enter(store, "newest"))
    assert catalog.read(store, 10).updates == 100, "the newest may replace what was there"
