"""A preparation that hangs is found at any kind of moment, and one that goes on is not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.driver import guard

ROOT = Path(__file__).parents[2]
WATCHED = """
import os, re, sys, time, ctypes
from pathlib import Path
from jobs.driver import standstill
standstill.GRACE_S = 0.3
watch = standstill.Standstill(Path(sys.argv[1]), float(sys.argv[3]))
try:
    with watch.watched():
        try:
            exec(sys.argv[2])
        except Exception as error:
            print("taken for a bad row", error)
    print("went on", flush=True)
except standstill.PreparationHung as error:
    print(error, flush=True)
    sys.exit(error.exit_code)
"""
HANGS = {
    "pipe": "os.mkfifo(sys.argv[1] + '.pipe'); open(sys.argv[1] + '.pipe').read()",
    "regex": "re.match(r'(a|a)+$', 'a' * 64 + 'b')",
    "loop": "while True: pass",
    "sleep": "time.sleep(60)",
}
DEAF = {
    "in C": "libc = ctypes.CDLL(None)\nwhile True: libc.usleep(60_000_000)",
    "in C with the lock": "libc = ctypes.PyDLL(None)\nlibc.pause.argtypes = []\n[libc.sleep(60) for _ in range(9)]",
}


def prepared(stacks: Path, code: str, after_s: float = 0.4) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WATCHED, str(stacks), code, str(after_s)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("code", HANGS.values(), ids=HANGS)
def test_what_hangs_ends_with_a_sentence_and_stacks(tmp_path, code):
    found = prepared(tmp_path / "stacks", code)
    assert found.returncode == 1, found.stderr
    assert "the preparation of the data hung: nothing was read and nothing was done for 0.4 s, in " in found.stdout
    assert "failures.hang_after_s" in found.stdout
    assert 'File "<string>"' in (tmp_path / "stacks").read_text()


@pytest.mark.parametrize("code", DEAF.values(), ids=DEAF)
def test_what_sees_no_signal_is_ended_from_outside(tmp_path, code):
    found = prepared(tmp_path / "stacks", "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, [14])\n" + code)
    assert found.returncode == 1, found.stderr
    assert "went on" not in found.stdout
    assert 'File "<string>"' in (tmp_path / "stacks").read_text()


@pytest.mark.parametrize(
    "going_on",
    [
        "for _ in range(22): time.sleep(0.05); watch.beat()",
        f"for _ in range(22): time.sleep(0.05); Path('/dev/zero').open('rb').read({17 << 20})",
    ],
    ids=["told", "reads"],
)
def test_what_goes_on_is_left_alone(tmp_path, going_on):
    if "zero" in going_on and not os.path.exists("/proc/self/io"):
        pytest.skip("this system does not count what a process reads")
    found = prepared(tmp_path / "stacks", going_on, after_s=0.9)  # 22 naps of a busy machine last longer, none of them
    assert found.stdout == "went on\n", found.stderr
    assert not (tmp_path / "stacks").exists()


def test_the_guard_tells_a_hang_from_a_death():
    assert guard.ending_of(stopped=False, hung=["preparation"]) == ("FAILED", guard.HUNG)
    assert guard.ending_of(stopped=False, hung=["0a1b"]) == ("FAILED", guard.DIED)
    assert guard.ending_of(stopped=False, hung=[], for_memory=True) == ("FAILED", guard.FOR_MEMORY)
    assert guard.ending_of(stopped=False, hung=["preparation"], for_memory=True) == ("FAILED", guard.HUNG)
    assert guard.ending_of(stopped=True, hung=["preparation"]) == ("KILLED", guard.OVERDUE)
