"""The guard of a driver outlives the end of the driver's whole tree of processes, and says how the run ended."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from jobs import lease
from jobs.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
DRIVER = """
import gc, sys, time
from pathlib import Path
from jobs import lease
from jobs.driver import guard
from jobs.run_folder import RunFolder
folder = RunFolder(Path(sys.argv[1]))
number = lease.take(folder.path).number
folder.begin()
pipe = guard.start(folder, number)
gc.collect()
print("guarded", flush=True)
if sys.stdin.readline():
    guard.dismiss(pipe)
    print("dismissed", flush=True)
time.sleep(60)
"""


def guards(run: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if "jobs.driver.guard" in command and str(run) in command:
            found.append(process)
    return found


def guard_of(run: Path) -> psutil.Process:
    deadline = time.monotonic() + 30
    while not guards(run) and time.monotonic() < deadline:
        time.sleep(0.05)
    (guard,) = guards(run)
    return guard


@pytest.fixture
def driver(tmp_path):
    """A process that has a guard, and a tracking server that never answers."""
    environment = {**os.environ, "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    command = [sys.executable, "-c", DRIVER, str(tmp_path)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout.readline().strip() == "guarded"
    yield process
    process.kill()
    process.communicate()
    for left in guards(tmp_path):
        left.kill()


def kill_tree(process: subprocess.Popen[str]) -> None:
    """Do what Ray does to a job that does not end in time."""
    root = psutil.Process(process.pid)
    for one in [root, *root.children(recursive=True)]:
        one.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize(("asked_to_stop", "status"), [(False, "FAILED"), (True, "KILLED")])
def test_a_driver_that_is_killed_with_its_tree_has_its_run_ended(tmp_path, driver, asked_to_stop, status):
    run = RunFolder(tmp_path)
    if asked_to_stop:
        run.request_stop()
    guard_of(tmp_path)
    assert run.status() == "RUNNING"
    kill_tree(driver)
    deadline = time.monotonic() + 30
    while run.status() == "RUNNING" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert run.status() == status


def test_a_guard_waits_as_long_as_its_driver_lives_and_goes_when_it_has_ended(tmp_path, driver):
    run, guard = RunFolder(tmp_path), guard_of(tmp_path)
    assert guard not in psutil.Process(driver.pid).children(recursive=True)
    assert run.status() == "RUNNING"
    run.write_status("FINISHED")
    kill_tree(driver)
    guard.wait(30)
    assert run.status() == "FINISHED"


def test_a_guard_keeps_silent_where_another_has_taken_the_run(tmp_path, driver):
    run, guard = RunFolder(tmp_path), guard_of(tmp_path)
    guard.suspend()
    kill_tree(driver)
    with lease.take(tmp_path).kept(lambda: None):
        guard.resume()
        guard.wait(30)
        assert run.status() == "RUNNING", "of the next owner"


def test_a_guard_that_was_dismissed_says_nothing_where_the_end_could_not_be_noted(tmp_path, driver):
    run, guard = RunFolder(tmp_path), guard_of(tmp_path)
    driver.stdin.write("end\n")
    driver.stdin.flush()
    assert driver.stdout.readline().strip() == "dismissed"
    kill_tree(driver)
    guard.wait(30)
    assert run.status() == "RUNNING"
