"""Locks of builds that were killed."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from jobs.worker import extension_locks

BUILD = """
import sys, time
from torch.utils.file_baton import FileBaton
assert FileBaton(sys.argv[1]).try_acquire()
print("building", flush=True)
time.sleep(600)
"""


def test_the_lock_of_a_killed_build_goes_and_that_of_a_living_one_stays(tmp_path: Path) -> None:
    lock = tmp_path / "async_io" / "lock"
    lock.parent.mkdir()
    build = subprocess.Popen([sys.executable, "-c", BUILD, str(lock)], stdout=subprocess.PIPE, text=True)
    try:
        assert build.stdout is not None
        assert build.stdout.readline() == "building\n"
        assert extension_locks.owners(lock) == [build.pid]
        assert extension_locks.remove_stale(tmp_path) == []
        assert lock.exists()
    finally:
        build.send_signal(signal.SIGKILL)
        build.wait()
    assert lock.exists(), "it is what later builds would wait on"
    assert extension_locks.remove_stale(tmp_path) == [lock]
    assert not lock.exists()
    assert extension_locks.remove_stale(tmp_path) == []
