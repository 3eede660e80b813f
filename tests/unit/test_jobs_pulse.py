"""A rank that gives no sign of life is found by the driver's clock alone, once, and only while it is silent."""

import os

import pytest

from jobs.driver import pulse
from jobs.driver.pulse import MARGIN_S, Sign, Silence
from jobs.run_folder import RunFolder
from jobs.worker.watchdog import Pulse, Watchdog


def sign(beats: int, allowed_s: float = 8.0) -> Sign:
    return Sign("n1", 11, beats, allowed_s)


def test_a_pulse_that_stays_the_same_for_longer_than_it_may_is_overdue_once():
    silence = Silence()
    assert silence.overdue({"a-rank-0": sign(1), "a-rank-1": sign(1)}, 100) == []
    assert silence.overdue({"a-rank-0": sign(2), "a-rank-1": sign(1)}, 100 + 8 + MARGIN_S) == []
    assert silence.overdue({"a-rank-0": sign(2), "a-rank-1": sign(1)}, 101 + 8 + MARGIN_S) == ["a-rank-1"]
    assert silence.overdue({"a-rank-0": sign(3), "a-rank-1": sign(1)}, 102 + 8 + MARGIN_S) == []


def test_a_moment_that_may_take_long_has_the_time_that_it_may_take():
    silence = Silence()
    silence.overdue({"a-rank-0": sign(1)}, 0)
    silence.overdue({"a-rank-0": sign(2, 1800)}, 10)
    assert silence.overdue({"a-rank-0": sign(2, 1800)}, 1815) == []
    assert silence.overdue({"a-rank-0": sign(2, 1800)}, 1821) == ["a-rank-0"]


def test_a_driver_that_was_stopped_itself_looks_before_it_judges():
    silence = Silence()
    silence.overdue({"a-rank-0": sign(1)}, 0)
    assert silence.overdue({"a-rank-0": sign(900)}, 9000) == []


def test_a_rank_that_has_ended_is_forgotten_and_one_that_comes_back_begins_anew():
    silence = Silence()
    silence.overdue({"a-rank-0": sign(1)}, 0)
    assert silence.overdue({}, 50) == []
    assert silence.overdue({"a-rank-0": sign(1)}, 100) == []


def test_a_watchdog_beats_at_each_new_limit_and_takes_its_pulse_away(tmp_path):
    run = RunFolder(tmp_path)
    dog = Watchdog(run.stacks("a", 0), 500.0, Pulse(run.pulse("a", 0), "n1"))
    (path,) = run.pulses()
    first = pulse.read(path)
    assert first == ("n1", os.getpid(), 1, 500.0)
    dog._armed_at = 0.0
    dog.step(1.0)
    assert pulse.read(path) == ("n1", os.getpid(), 2, 11.0)
    with dog.during("save", learns=False):
        assert pulse.read(path) == ("n1", os.getpid(), 3, 500.0)
    dog.stop()
    assert run.pulses() == []


def test_a_storage_that_does_not_take_a_pulse_costs_the_run_nothing(tmp_path):
    dog = Watchdog(tmp_path / "rank-0.txt", 500.0, Pulse(tmp_path / "not there" / "pulse", "n1"))
    dog.stop()


@pytest.mark.parametrize("content", ["", "n1 11", "n1 11 x 1.0", "n1 11 1 1.0 more"])
def test_a_pulse_that_is_being_written_says_nothing_yet(tmp_path, content):
    (tmp_path / "a-rank-0").write_text(content)
    assert pulse.read(tmp_path / "a-rank-0") is None
    assert pulse.read(tmp_path / "gone") is None
