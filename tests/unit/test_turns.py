"""A test that must be alone waits for those that run, those that come later wait for it."""

import fcntl
import os
import threading
import time
from pathlib import Path

import pytest

from tests.support.turns import Turns


def is_taken(lock: Path) -> bool:
    file = os.open(lock, os.O_RDWR)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False


def wait_until_taken(lock: Path) -> None:
    deadline = time.monotonic() + 30
    while not is_taken(lock):
        assert time.monotonic() < deadline, f"nobody waits at the {lock.name}"
        time.sleep(0.01)


class Waiting:
    """Somebody who enters in a thread, and says so."""

    def __init__(self, folder: Path, name: str, log: list[str], alone: bool) -> None:
        self.place = Turns(folder)
        self._thread = threading.Thread(target=self._enter, args=(name, log, alone), daemon=True)
        self._thread.start()

    def _enter(self, name: str, log: list[str], alone: bool) -> None:
        self.place.enter(alone)
        log.append(name)

    def has_entered(self) -> bool:
        self._thread.join(30)
        return not self._thread.is_alive()


def test_one_that_must_be_alone_comes_after_those_that_run_and_before_those_that_come_later(tmp_path: Path) -> None:
    first, second, log = Turns(tmp_path), Turns(tmp_path), list[str]()
    first.enter(alone=False)
    second.enter(alone=False)
    lonely = Waiting(tmp_path, "lonely", log, alone=True)
    wait_until_taken(tmp_path / "door")
    first.leave(next_alone=False)
    later = Waiting(tmp_path, "later", log, alone=False)
    assert log == [], "the second is still there"
    second.leave(next_alone=False)
    assert lonely.has_entered()
    assert log == ["lonely"]
    lonely.place.leave(next_alone=False)
    assert later.has_entered()
    assert log == ["lonely", "later"]


@pytest.mark.parametrize("next_alone", [True, False])
def test_nobody_comes_between_two_that_must_be_alone(tmp_path: Path, next_alone: bool) -> None:
    lonely, log = Turns(tmp_path), list[str]()
    lonely.enter(alone=True)
    other = Waiting(tmp_path, "other", log, alone=False)
    wait_until_taken(tmp_path / "door")
    lonely.leave(next_alone)
    if next_alone:
        lonely.enter(alone=True)  # not stopped by the other, who stands at the door
        assert is_taken(tmp_path / "room")
        assert log == []
        lonely.leave(next_alone=False)
    assert other.has_entered()
    assert log == ["other"]
