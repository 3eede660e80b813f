"""A job that is asked to stop: when, how often, and whether there is something to save decide what follows."""

import os
import signal

import pytest

from jobs.driver.stopping import SIGNALS, Stop, Stopped
from jobs.run_folder import RunFolder
from jobs.run_notes import Attempt


@pytest.fixture(autouse=True)
def _signals():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def listening(folder: RunFolder, *, trains: bool) -> Stop:
    stop = Stop(folder, trains=trains)
    stop.listen()
    return stop


@pytest.mark.parametrize("number", SIGNALS)
def test_a_phase_that_has_nothing_to_save_ends_at_once_and_the_guard_knows(tmp_path, number):
    folder = RunFolder(tmp_path)
    stop = listening(folder, trains=False)
    with pytest.raises(Stopped), stop:
        os.kill(os.getpid(), number)
    assert stop.asked
    assert folder.stop_requested()


def test_a_group_that_trains_is_asked_to_save(tmp_path, capsys):
    folder = RunFolder(tmp_path)
    stop = listening(folder, trains=True)
    folder.write_attempt(Attempt("a", 1, 1))
    with stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    assert folder.stop_requested()
    assert capsys.readouterr().out.count("a checkpoint is written first") == 1


def test_before_there_is_a_group_nothing_is_waited_for(tmp_path):
    stop = listening(RunFolder(tmp_path), trains=True)
    with pytest.raises(Stopped), stop:
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_request_before_the_phase_ends_it_as_it_begins(tmp_path):
    stop = listening(RunFolder(tmp_path), trains=True)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped), stop:
        raise AssertionError("it has begun")


def test_a_second_request_does_not_disturb_what_ends_the_run(tmp_path):
    stop = listening(RunFolder(tmp_path), trains=False)
    ended = False
    try:
        with stop:
            os.kill(os.getpid(), signal.SIGTERM)
    except Stopped:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        ended = True
    assert ended


def test_a_request_after_the_phase_changes_nothing(tmp_path):
    stop = listening(RunFolder(tmp_path), trains=True)
    with stop:
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.asked


def test_without_a_storage_for_the_request_it_ends_unsaved(tmp_path, capsys):
    folder = RunFolder(tmp_path / "gone")
    stop = listening(folder, trains=True)
    with pytest.raises(Stopped), stop:
        os.kill(os.getpid(), signal.SIGTERM)
    assert "cannot be written" in capsys.readouterr().out
