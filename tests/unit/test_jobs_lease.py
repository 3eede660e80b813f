"""A run has one owner: whoever comes second is told who, and a dead owner is no owner."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest

from jobs import lease
from jobs.lease import RunIsOwned

ROOT = Path(__file__).parents[2]
OWNER = """
import sys, time
from pathlib import Path
from jobs import lease
run = Path(sys.argv[1])
try:
    with lease.take(run, sys.argv[2]).kept(lambda: None):
        print("took it", flush=True)
        time.sleep(float(sys.argv[3]))
except lease.RunIsOwned as error:
    print(error, flush=True)
"""


def owner(run: Path, job: str, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", OWNER, str(run), job, str(seconds)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_of_several_at_once_one_gets_the_run_and_the_others_are_told_which(tmp_path):
    started = [owner(tmp_path, f"job-{number}", 3) for number in range(4)]
    said = [process.communicate(timeout=30)[0].strip() for process in started]
    (winner,) = [number for number, line in enumerate(said) if line == "took it"]
    for number, line in enumerate(said):
        if number != winner:
            assert line.startswith(f"job job-{winner} works on the run {tmp_path.name} since ")
            assert f"tandem jobs stop job-{winner}" in line
            assert f"process {started[winner].pid} on" in line
    assert lease.newest(tmp_path) == 1


def test_one_that_let_go_leaves_the_run_free_and_a_number_behind(tmp_path):
    for number in (1, 2, 3, 4):
        held = lease.take(tmp_path)
        assert held.number == number
        assert held.held()
        with pytest.raises(RunIsOwned, match=f"process {os.getpid()} works on the run"):
            lease.take(tmp_path)
        held.release()
    assert len(list((tmp_path / "lease").iterdir())) <= 3, "old ones go"


def test_a_killed_owner_is_none_and_a_stopped_one_still_is(tmp_path):
    first = owner(tmp_path, "job-1", 60)
    try:
        assert first.stdout.readline().strip() == "took it"
        first.send_signal(signal.SIGSTOP)
        with pytest.raises(RunIsOwned, match="job job-1 works on"):
            lease.take(tmp_path)
        first.kill()
        while psutil.pid_exists(first.pid) and psutil.Process(first.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        assert lease.take(tmp_path).number == 2
    finally:
        first.kill()
        first.communicate()


@pytest.mark.parametrize("other", [{"born": "1"}, {"born": "", "started_at": 1.0}], ids=["now", "older lease"])
def test_a_process_with_the_number_of_a_dead_owner_is_not_taken_for_it(tmp_path, other):
    held = lease.take(tmp_path)
    path = tmp_path / "lease" / "00000001.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **other}))
    assert lease.take(tmp_path).number == 2
    assert not held.held()


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A lease whose owner is on another machine; a silence of a second is long."""
    monkeypatch.setattr(lease, "STALE_S", 1.0)
    held = lease.take(tmp_path, "far")
    path = tmp_path / "lease" / "00000001.json"
    path.write_text(json.dumps({**asdict(held._owner), "host": "machine-b/boot/ns"}))
    return path


def test_an_owner_elsewhere_without_a_sign_of_life_is_gone(tmp_path, elsewhere):
    assert lease.take(tmp_path).number == 2


def test_an_owner_elsewhere_with_one_is_not(tmp_path, elsewhere):
    touch = "import os, sys, time\nwhile True:\n    os.utime(sys.argv[1]); time.sleep(0.05)"
    alive = subprocess.Popen([sys.executable, "-c", touch, str(elsewhere)])
    try:
        before = elsewhere.stat().st_mtime
        while elsewhere.stat().st_mtime == before:
            time.sleep(0.01)
        with pytest.raises(RunIsOwned, match=r"process \d+ on machine-b"):
            lease.take(tmp_path)
    finally:
        alive.kill()
        alive.wait()


def test_an_owner_that_has_lost_its_run_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_S", 0.02)
    lost = []
    with lease.take(tmp_path).kept(lambda: lost.append(True)):
        assert lost == []
        me = psutil.Process()
        thief = lease.Owner(lease.this_host(), me.pid, me.create_time(), "thief", "now")
        assert lease._create(tmp_path, 2, thief)
        deadline = time.monotonic() + 10
        while not lost and time.monotonic() < deadline:
            time.sleep(0.01)
    assert lost == [True]


def test_a_number_is_given_once(tmp_path):
    held = lease.take(tmp_path)
    assert not lease._create(tmp_path, 1, replace(held._owner, job="late"))
    assert not lease._create_empty(tmp_path, 1, replace(held._owner, job="late"))
    assert lease._create_empty(tmp_path, 2, replace(held._owner, job="next"))
    assert lease._read(tmp_path, 2).job == "next"


def test_a_clock_that_is_set_anew_takes_no_run_away(tmp_path):
    """The kernel tells when a process began by a clock that shifts with the time of day."""
    held = lease.take(tmp_path)
    path = tmp_path / "lease" / "00000001.json"
    written = json.loads(path.read_text())
    path.write_text(json.dumps({**written, "started_at": written["started_at"] - 3600}))
    with pytest.raises(RunIsOwned):
        lease.take(tmp_path)
    held.release()


def test_whoever_is_refused_learns_that_the_owner_is_stopped(tmp_path):
    process = owner(tmp_path, "job-1", 60)
    try:
        assert process.stdout.readline().strip() == "took it"
        os.kill(process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        with pytest.raises(RunIsOwned, match=f"which is stopped: kill -CONT {process.pid} lets it go on"):
            lease.take(tmp_path)
    finally:
        process.kill()
        process.communicate()


def test_a_lease_from_the_future_does_not_lock_its_run_for_ever(tmp_path, elsewhere):
    """A clock that was set back since has touched it: it has no age, but no sign of life either."""
    ahead = time.time() + 1e6
    os.utime(elsewhere, (ahead, ahead))
    assert lease.take(tmp_path).number == 2
