"""A sweep's loop, with trials that measure what a test says and train nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from jobs.driver.sweep import process
from jobs.driver.sweep.runner import Ready, Runner
from jobs.driver.sweep.trials import Journal, Trial
from jobs.run_folder import RunFolder
from jobs.spec_sweep import SweepSpec
from tracking.spool import Spool

STEPS = 30


class Asked(BaseException):
    """What a signal raises in the driver's main thread."""


class Played:
    """A trial: at each look it measures once more, until it has nothing left to measure or is asked to stop."""

    def __init__(self, folder: Path, measures: list[float], code: int = 0) -> None:
        self._folder, self._left, self._code = RunFolder(folder), list(measures), code
        self._spool = Spool(self._folder.rank_0_spool)
        self._made = 0
        self._stopping = False
        self._folder.write_status("RUNNING")

    def ended(self) -> int | None:
        if self._stopping or not self._left:
            return self.wait()
        if self._left:
            self._made += 10
            self._spool.append(self._made, {"eval_accuracy": self._left[0], "eval_loss": 1.0})
            self._last = self._left.pop(0)
        return None

    def stop(self) -> None:
        self._stopping = True

    def wait(self) -> int:
        if self._stopping and self._left:
            self._folder.write_status("KILLED")
            return 1
        if self._code:
            (self._folder.path / process.LOG).write_text("tandem: error: no room\n")
            self._folder.write_status("FAILED")
            return self._code
        self._folder.write_evaluations({"final": {"accuracy": self._last, "loss": 1.0}})
        self._folder.write_status("FINISHED")
        return 0


@dataclass
class Bench:
    """A sweep in a folder, and how its trials play."""

    root: Path
    play: Callable[[int, Path], Played]
    begun: list[int] = field(default_factory=list)
    refused: dict[int, str] = field(default_factory=dict)
    told: list[Trial] = field(default_factory=list)

    def ready(self, number: int, values: dict[str, Any]) -> Ready | str:
        if number in self.refused:
            return self.refused[number]
        folder = self.root / f"run-{number}"
        folder.mkdir(exist_ok=True)
        return Ready(folder, STEPS)

    def tell(self, trial: Trial) -> None:
        self.told.append(trial)

    def begin(self, folder: Path) -> Played:
        number = int(folder.name.rpartition("-")[2])
        self.begun.append(number)
        return self.play(number, folder)

    def runner(self, parallel: int = 1, **sweep: Any) -> tuple[Runner, Journal]:
        fields = {"a": {"min": 0.0, "max": 1.0}}
        spec = SweepSpec.model_validate({"fields": fields, "trials": 5, "metric": "accuracy", **sweep})
        journal = Journal.read(self.root)
        return Runner(spec, "max", journal, self, parallel, self.begin, poll_s=0.001), journal


def rising(*levels: float) -> Callable[[int, Path], Played]:
    """Trials that measure their level, three times."""
    return lambda number, folder: Played(folder, [levels[number]] * 3)


def test_all_trials_are_made_and_the_bad_ones_stopped(tmp_path: Path) -> None:
    bench = Bench(tmp_path, rising(0.5, 0.8, 0.4, 0.9, 0.6))
    runner, journal = bench.runner()
    runner.run()
    assert [trial.ended for trial in journal.trials] == ["finished", "finished", "stopped", "finished", "stopped"]
    assert [trial.value for trial in journal.trials] == [0.5, 0.8, 0.4, 0.9, 0.6]
    assert [len(trial.evaluations) for trial in journal.trials] == [3, 3, 1, 3, 1]
    assert bench.told[-1] == journal.trials[-1]


def test_no_more_run_at_once_than_there_is_room_for(tmp_path: Path) -> None:
    running: set[int] = set()
    most = 0

    class Counted(Played):
        def __init__(self, number: int, folder: Path) -> None:
            nonlocal most
            super().__init__(folder, [0.5] * (number + 1))
            self._number = number
            running.add(number)
            most = max(most, len(running))

        def wait(self) -> int:
            running.discard(self._number)
            return super().wait()

    runner, journal = Bench(tmp_path, Counted).runner(parallel=2, scheduler={"name": "none"})
    runner.run()
    assert most == 2
    assert [trial.ended for trial in journal.trials] == ["finished"] * 5


def test_a_trial_that_fails_is_a_trial(tmp_path: Path) -> None:
    bench = Bench(tmp_path, lambda number, folder: Played(folder, [0.5], code=2 if number == 1 else 0))
    bench.refused = {3: "width: 7 does not divide"}
    runner, journal = bench.runner()
    runner.run()
    assert [trial.ended for trial in journal.trials] == ["finished", "failed", "finished", "failed", "finished"]
    assert [journal.trials[number].reason for number in (1, 3)] == ["no room", "width: 7 does not divide"]
    assert 3 not in bench.begun


def test_a_sweep_goes_on_where_its_driver_was_killed(tmp_path: Path) -> None:
    Bench(tmp_path, rising(0.5, 0.8, 0.4, 0.9, 0.6)).runner()[0].run()
    lines = (tmp_path / "trials.jsonl").read_text().splitlines(keepends=True)
    whole = Journal.read(tmp_path).trials
    third = next(index for index, line in enumerate(lines) if '"trial": 3' in line)
    (tmp_path / "trials.jsonl").write_text("".join(lines[: third + 2]))  # the fourth has begun and measured once
    bench = Bench(tmp_path, rising(0.5, 0.8, 0.4, 0.9, 0.6))
    RunFolder(tmp_path / "run-3").write_status("FAILED")  # as its guard has noted
    runner, journal = bench.runner()
    runner.run()
    assert bench.begun == [3, 4]
    assert journal.trials == whole


def test_a_trial_that_finished_as_the_driver_died_is_not_made_again(tmp_path: Path) -> None:
    Bench(tmp_path, rising(0.5, 0.8, 0.4, 0.9, 0.6)).runner()[0].run()
    lines = (tmp_path / "trials.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "trials.jsonl").write_text(
        "".join(line for line in lines if '"trial": 0' in line and "ended" not in line)
    )
    bench = Bench(tmp_path, rising(0.5, 0.8, 0.4, 0.9, 0.6))
    runner, journal = bench.runner()
    runner.run()
    assert 0 not in bench.begun
    assert (journal.trials[0].ended, journal.trials[0].value) == ("finished", 0.5)


def test_what_asha_gave_up_as_the_driver_died_has_stopped(tmp_path: Path) -> None:
    Bench(tmp_path, rising(0.5, 0.8, 0.4, 0.9, 0.6)).runner()[0].run()
    lines = (tmp_path / "trials.jsonl").read_text().splitlines(keepends=True)
    end = next(index for index, line in enumerate(lines) if '"ended": "stopped"' in line)
    (tmp_path / "trials.jsonl").write_text("".join(lines[:end]))
    bench = Bench(tmp_path, rising(0.5, 0.8, 0.4, 0.9, 0.6))
    runner, journal = bench.runner()
    runner.run()
    assert 2 not in bench.begun
    assert journal.trials[2].ended == "stopped"


def test_a_sweep_that_is_stopped_leaves_its_trials_to_go_on(tmp_path: Path) -> None:
    def play(number: int, folder: Path) -> Played:
        return Played(folder, [0.5] * 3)

    bench = Bench(tmp_path, play)
    runner, journal = bench.runner(parallel=2)
    looks = iter(range(3))

    def tell(trial: Trial) -> None:
        if next(looks, None) is None:
            raise Asked

    bench.tell = tell  # type: ignore[method-assign]
    with pytest.raises(Asked):
        runner.run()
    bench.tell = lambda trial: None  # type: ignore[method-assign]
    runner.end()
    assert [trial.ended for trial in journal.trials] == [None, None]
    assert RunFolder(tmp_path / "run-0").status() == "KILLED"


class Begins(Played):
    """Its process has no run yet, and no handler for signals."""

    def __init__(self, number: int, folder: Path) -> None:
        super().__init__(folder, [0.5])
        (folder / "status.json").unlink()

    def ended(self) -> int | None:
        return -15 if self._stopping else None

    def wait(self) -> int:
        return -15


def test_a_trial_that_was_stopped_before_it_began_has_not_failed(tmp_path: Path) -> None:
    class Interrupted(Begins):
        def ended(self) -> int | None:
            raise Asked

    runner, journal = Bench(tmp_path, Interrupted).runner()
    with pytest.raises(Asked):
        runner.run()
    runner.end()
    assert [trial.ended for trial in journal.trials] == [None]


def test_a_trial_that_the_time_stops_before_it_began_is_out_of_time(tmp_path: Path) -> None:
    runner, journal = Bench(tmp_path, Begins).runner(time_budget_s=0.05)
    runner.run()
    assert [trial.ended for trial in journal.trials] == ["out of time"]


def test_when_the_time_is_over_the_rest_is_stopped_and_no_more_begin(tmp_path: Path) -> None:
    def play(number: int, folder: Path) -> Played:
        return Played(folder, [0.5] if number == 0 else [0.5] * 100_000)

    runner, journal = Bench(tmp_path, play).runner(time_budget_s=0.2, scheduler={"name": "none"})
    began = time.monotonic()
    runner.run()
    assert time.monotonic() - began > 0.2
    assert [trial.ended for trial in journal.trials] == ["finished", "out of time"]
