"""Exactly the cluster's processes are found and ended: not fewer, and no stranger."""

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster import processes
from cluster.processes import MARKER
from cluster.ray_process_internals import JOB_MARKER

SLEEP = "import time; time.sleep(60)"
PARENT_OF_UNMARKED = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {SLEEP!r}], env={{}}, start_new_session=True)
print(child.pid, flush=True)
child.wait()
"""
SAVES_WHEN_ASKED = """
import signal, sys, time
def stop(*_):
    time.sleep(0.5)
    open(sys.argv[1], "w").write("saved")
    sys.exit()
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
time.sleep(60)
"""
IGNORES_SIGTERM = "import signal, time; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"


class Started:
    """Start Python processes of one cluster id, and remember them."""

    def __init__(self) -> None:
        self.id = secrets.token_hex(8)
        self.started_at = time.time()
        self.processes: list[subprocess.Popen[str]] = []

    def python(self, *command: str, **env: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", *command],
            env={**os.environ, **env},
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.processes.append(process)
        return process

    def find(self) -> list[psutil.Process]:
        sessions = [process.pid for process in self.processes if process.args[-1] == "in session"]  # type: ignore[index]
        return processes.members(self.id, sessions, self.started_at)


@pytest.fixture
def started() -> Iterator[Started]:
    found = Started()
    yield found
    for process in found.processes:
        process.kill()
        process.communicate()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_marked_processes_and_their_unmarked_children_are_ended_and_strangers_live(started: Started) -> None:
    parent = started.python(PARENT_OF_UNMARKED, **{MARKER: started.id})
    child = psutil.Process(int(line(parent)))
    stranger = started.python(SLEEP, **{MARKER: "another cluster"})
    assert {process.pid for process in started.find()} == {parent.pid, child.pid}
    assert processes.end(started.find, grace_s=1) == 2
    assert not started.find()
    assert not processes.is_running(child.pid, started.id)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    assert stranger.poll() is None


def test_reused_session_number_is_not_taken_for_ours(started: Started) -> None:
    """After `ray start` has ended, its number may lead a stranger's session."""
    started.python(SLEEP, "in session")
    assert started.find() == []


def test_nothing_from_before_a_reboot_is_ours(started: Started) -> None:
    ready = started.python(f"print('ready', flush=True); {SLEEP}", **{MARKER: started.id})
    assert line(ready) == "ready"
    assert len(started.find()) == 1
    started.started_at = psutil.boot_time() - 60
    assert started.find() == []


def test_processes_get_time_to_end_and_are_killed_after_it(started: Started, tmp_path: Path) -> None:
    saves = started.python(SAVES_WHEN_ASKED, str(tmp_path / "saved"), **{MARKER: started.id})
    stubborn = started.python(IGNORES_SIGTERM, **{MARKER: started.id})
    assert line(saves) == line(stubborn) == "ready"
    assert processes.end(started.find, grace_s=1.5) == 2
    assert (tmp_path / "saved").read_text() == "saved"
    assert not started.find()


def test_only_job_drivers_are_waited_for(started: Started) -> None:
    started.python(SLEEP, **{MARKER: started.id})
    begun = time.monotonic()
    processes.wait_for_job_drivers(started.find, timeout_s=60)
    assert time.monotonic() - begun < 30
    ends = "import time; print('ready', flush=True); time.sleep(1)"  # a process just begun shows no variables yet
    assert line(started.python(ends, **{MARKER: started.id, JOB_MARKER: "{}"})) == "ready"
    processes.wait_for_job_drivers(started.find, timeout_s=60)
    assert len(started.find()) == 1


def test_daemon_is_recognised_by_its_marker_not_by_its_pid(started: Started) -> None:
    daemon = started.python(IGNORES_SIGTERM, **{MARKER: started.id})
    assert line(daemon) == "ready"
    assert processes.is_running(daemon.pid, started.id)
    assert not processes.is_running(daemon.pid, "another cluster")
    daemon.kill()
    daemon.wait()
    assert not processes.is_running(daemon.pid, started.id)
