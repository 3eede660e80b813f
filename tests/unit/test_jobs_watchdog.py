"""A rank that hangs ends itself and leaves its stacks, whatever it hangs in and whenever."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.worker import watchdog
from jobs.worker.watchdog import EXIT_CODE, Watchdog

ROOT = Path(__file__).parents[2]
HANGS = """
import re, sys, time
from pathlib import Path
from jobs.worker import watchdog
watchdog.MARGIN_S, watchdog.GRACE_S, watchdog.KERNEL_S = 0.3, 0.2, 0.6
path, moment, how = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
def stuck(now):
    if now == moment and how == "lock":
        re.match("(a|a)+$", "a" * 64 + "b")  # holds Python's lock: no other thread of Python runs
    if now == moment:
        time.sleep(60)
dog = watchdog.Watchdog(path, 1.0)
stuck("start")
for step in range(3):
    time.sleep(0.02)
    stuck("step" if step == 2 else "")
    dog.step(0.02)
dog._longest_s = 60.0  # from here on only what was learned can find it in time
for evaluation in range(2):
    with dog.during("evaluation"):
        time.sleep(0.02)
        stuck("evaluation" if evaluation else "")
    stuck("after an evaluation" if evaluation else "")
with dog.during("save", learns=False):
    if moment == "save":
        dog._longest_s = 1.0
        dog._arm(1.0)
    stuck("save")
stuck("after a save")
"""


MOMENTS = [
    *((moment, "sleep") for moment in ("start", "step", "evaluation", "after an evaluation", "save", "after a save")),
    ("after a save", "lock"),
    ("start", "lock"),
]


@pytest.fixture(scope="module")
def hung(tmp_path_factory):
    """One process a moment, all started at once: most of their time they wait."""
    folder = tmp_path_factory.mktemp("hung")
    command = [sys.executable, "-c", HANGS]
    started = {
        (moment, how): subprocess.Popen([*command, str(folder / f"{moment}-{how}"), moment, how], cwd=ROOT)
        for moment, how in MOMENTS
    }
    yield folder, started
    for process in started.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize(("moment", "how"), MOMENTS)
def test_a_hang_leaves_stacks_and_ends_the_process(hung, moment, how):
    folder, started = hung
    ended = started[moment, how].wait(timeout=30)
    assert ended == (-signal.SIGALRM if how == "lock" else EXIT_CODE)
    assert "in stuck" in (folder / f"{moment}-{how}").read_text()


def test_a_process_that_was_given_no_time_leaves_its_stacks_too(tmp_path):
    """Stopped until all limits are past, it wakes with the thread in C and the one of Python due at the same moment."""
    path = tmp_path / "stacks"
    code = HANGS.replace('stuck("start")', 'print(flush=True); stuck("start")')
    command = [sys.executable, "-c", code, str(path), "start", "sleep"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGSTOP)
        time.sleep(1.6)
        process.send_signal(signal.SIGCONT)
        ended = process.wait(timeout=30)
    assert ended in (EXIT_CODE, -signal.SIGALRM)
    # Where in its code it was stopped is chance.
    assert ended != EXIT_CODE or "most recent call first" in path.read_text()


def test_stacks_that_are_there_stay_as_they_are(tmp_path):
    dog = Watchdog(tmp_path / "rank-0.txt")
    dog._leave_stacks()
    first = (tmp_path / "rank-0.txt").read_text()
    assert "test_stacks_that_are_there_stay_as_they_are" in first
    dog._leave_stacks()
    assert (tmp_path / "rank-0.txt").read_text() == first
    dog.stop()
    dog._leave_stacks()


def test_one_that_was_stopped_leaves_nothing(tmp_path):
    dog = Watchdog(tmp_path / "rank-0.txt")
    dog.step(0.1)
    with dog.during("evaluation"):
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
    dog.stop()
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("lengths", "allowed"), [([], 1800.0), ([1.0], 11.0), ([0.1] * 9 + [60.0], 8.3), ([1e6], 1800.0)]
)
def test_the_limit_follows_the_median(lengths, allowed):
    assert watchdog.limit(lengths, 1800.0) == pytest.approx(allowed)


def allowed_now(dog: Watchdog) -> float:
    return dog._deadline - dog._armed_at


def test_each_kind_of_moment_has_its_own_limit(tmp_path):
    dog = Watchdog(tmp_path / "rank-0.txt", 500.0)
    try:
        assert allowed_now(dog) == pytest.approx(500)
        with dog.during("evaluation"):
            assert allowed_now(dog) == pytest.approx(500), "the first one"
        assert allowed_now(dog) == pytest.approx(500), "the first step"
        dog._armed_at = 0.0
        dog.step(1.0)
        assert allowed_now(dog) == pytest.approx(11)
        with dog.during("evaluation"):
            assert 8 <= allowed_now(dog) < 20, "as the last evaluation"
        assert allowed_now(dog) == pytest.approx(11), "the step after it has a step's limit again"
        for _ in range(2):
            with dog.during("save", learns=False):
                assert allowed_now(dog) == pytest.approx(500), "a storage may always be slow"
            assert allowed_now(dog) == pytest.approx(11)
        with dog.during("export", learns=False):
            with dog.during("evaluation"):
                assert allowed_now(dog) < 20
            assert allowed_now(dog) == pytest.approx(500), "the export goes on"
    finally:
        dog.stop()


def test_an_exception_in_an_evaluation_ends_its_limit(tmp_path):
    dog = Watchdog(tmp_path / "rank-0.txt")
    dog._armed_at = 0.0
    dog.step(1.0)
    with pytest.raises(OSError, match="missing"), dog.during("evaluation"):
        raise OSError("missing")
    assert allowed_now(dog) == pytest.approx(11)
    dog.stop()
