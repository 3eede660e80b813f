"""A rank that hangs ends itself and leaves its stacks, whatever it hangs in."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.worker.watchdog import EXIT_CODE, Watchdog

ROOT = Path(__file__).parents[2]
HANGS = """
import sys, time
from pathlib import Path
from jobs.worker import watchdog
watchdog.MARGIN_S = 0.3
watchdog.GRACE_S = 0.2
dog = watchdog.Watchdog(Path(sys.argv[1]))
for _ in range(5):
    dog.step(0.01)
    dog.allow()  # a checkpoint, say; the step after it ends that
    dog.step(0.01)
def stuck():
    time.sleep(60)
stuck()
"""


def test_a_hang_leaves_stacks_and_ends_the_process(tmp_path):
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", HANGS, str(tmp_path / "s" / "rank-0.txt")], cwd=ROOT, check=False)
    assert done.returncode == EXIT_CODE
    assert time.monotonic() - began < 30
    assert "in stuck" in (tmp_path / "s" / "rank-0.txt").read_text()


def test_one_that_was_stopped_leaves_nothing(tmp_path):
    dog = Watchdog(tmp_path / "rank-0.txt")
    dog.step(0.1)
    dog.stop()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("steps", "limit"), [([1.0], 11.0), ([0.1] * 9 + [60.0], 8.3), ([1e6], 1800.0)])
def test_the_limit_follows_the_median_step(tmp_path, steps, limit):
    dog = Watchdog(tmp_path / "rank-0.txt")
    try:
        for seconds in steps:
            dog._armed_at = 0.0
            dog.step(seconds)
        assert dog._deadline - dog._armed_at == pytest.approx(limit)
    finally:
        dog.stop()
