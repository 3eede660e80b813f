"""What is written down of a sweep's trials, which is the best, and which values the next one has."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs import trial_table
from jobs.driver.job import Part
from jobs.driver.sweep import plots, process, report, trials
from jobs.driver.sweep.suggest import suggest
from jobs.driver.sweep.trials import DamagedJournal, Journal, Trial
from jobs.driver.sweep.tune import Halving
from jobs.spec_sweep import SchedulerSpec, SweepSpec
from jobs.trial_table import TrialLine

FIELDS: dict[str, Any] = {
    "training.learning_rate": {"min": 1e-4, "max": 1e-1, "log": True},
    "training.betas": {"choices": [[0.9, 0.95], [0.9, 0.99], [0.8, 0.9]]},
    "model.config.width": {"min": 2, "max": 64, "whole": True, "log": True},
    "training.weight_decay": {"min": 0.0, "max": 0.3, "step": 0.1},
}


def sweep(**changes: Any) -> SweepSpec:
    return SweepSpec.model_validate({"fields": FIELDS, "trials": 20, "metric": "accuracy", **changes})


def made(spec: SweepSpec, mode: str = "max", value: Any = lambda values: 0.0) -> list[Trial]:
    known: list[Trial] = []
    for number in range(spec.count):
        values = suggest(spec, number, known, mode)
        known.append(Trial(number, values, ended="finished", value=value(values)))
    return known


@pytest.mark.parametrize("search", ["random", "optuna"])
def test_values_are_within_their_fields_and_the_same_each_time(search: str) -> None:
    known = made(sweep(search=search))
    assert [trial.values for trial in known] == [trial.values for trial in made(sweep(search=search))]
    assert [trial.values for trial in known] != [trial.values for trial in made(sweep(search=search, seed=1))]
    for trial in known:
        assert 1e-4 <= trial.values["training.learning_rate"] <= 1e-1
        assert trial.values["training.betas"] in FIELDS["training.betas"]["choices"]
        assert trial.values["model.config.width"] in range(2, 65)
        assert trial.values["training.weight_decay"] in (0.0, 0.1, 0.2, 0.3)


def test_a_trial_that_was_to_come_does_not_depend_on_which_of_those_before_have_ended() -> None:
    known = made(sweep())
    still_running = [replace(trial, ended=None, value=None) for trial in known[:7]]
    assert suggest(sweep(), 7, still_running, "max") == known[7].values


def test_optuna_learns_which_values_do_well() -> None:
    def distance(values: Any) -> float:
        return abs(math.log10(values["training.learning_rate"]) + 3)

    learned = made(sweep(search="optuna", trials=40), "min", distance)
    drawn = made(sweep(trials=40), "min", distance)
    late = [sum(trial.value or 0.0 for trial in known[20:]) for known in (learned, drawn)]
    assert late[0] < 0.7 * late[1]


def test_optuna_takes_trials_that_failed_or_measured_nothing() -> None:
    spec = sweep(search="optuna")
    known = made(spec)[:6]
    ends: list[Any] = ["finished", "failed", "stopped", "out of time", "finished", None]
    values = [0.5, None, 0.4, None, math.nan, None]
    odd = [replace(trial, ended=end, value=value) for trial, end, value in zip(known, ends, values, strict=True)]
    assert set(suggest(spec, 6, odd, "max")) == set(FIELDS)


def test_no_combination_is_tried_twice() -> None:
    few = {"a": {"choices": [1, 2, 3]}, "b": {"min": 0.0, "max": 1.0, "step": 0.5}}
    for search in ("random", "optuna"):
        known = made(sweep(fields=few, trials=9, search=search))
        assert len({json.dumps(trial.values) for trial in known}) == 9


def test_the_first_trial_may_be_given() -> None:
    drawn = made(sweep())
    assert suggest(sweep(), 0, [], "max", {"a": 1}) == {"a": 1}
    assert suggest(sweep(), 1, drawn[:1], "max", {"a": 1}) == drawn[1].values


def test_a_grid_takes_all_combinations_in_order() -> None:
    few = {"a": {"choices": ["x", "y"]}, "b": {"min": 1, "max": 2, "whole": True}}
    known = made(sweep(fields=few, trials=None, search="grid"))
    assert [tuple(trial.values.values()) for trial in known] == [("x", 1), ("x", 2), ("y", 1), ("y", 2)]


def test_asha_stops_what_does_worse_than_the_best_third_at_the_same_evaluation() -> None:
    halving = Halving(SchedulerSpec(), "max")
    assert not halving.stops(0, 1, 0.9)
    assert not halving.stops(1, 1, 0.95)
    assert halving.stops(2, 1, 0.5)
    assert not halving.stops(3, 1, 0.96)
    assert not halving.stops(0, 2, 0.1), "only at evaluations grace × factor^k"
    assert not halving.stops(0, 3, 0.9)
    assert halving.stops(1, 3, 0.8)


def test_asha_waits_for_its_grace_and_knows_that_less_may_be_better() -> None:
    halving = Halving(SchedulerSpec(grace=2, reduction_factor=2), "min")
    assert not halving.stops(0, 1, 9.0)
    assert not halving.stops(1, 1, 0.1)
    assert not halving.stops(0, 2, 0.2)
    assert halving.stops(1, 2, 0.3)
    assert not halving.stops(2, 2, 0.1)
    assert not halving.stops(3, 2, math.nan)


def test_without_a_scheduler_none_is_stopped() -> None:
    halving = Halving(SchedulerSpec(name="none"), "max")
    assert not any(halving.stops(trial, 1, -trial) for trial in range(9))


def test_a_journal_is_read_back_as_it_was(tmp_path: Path) -> None:
    journal = Journal.read(tmp_path)
    journal.add({"trial": 0, "values": {"a": 1}, "run": "r-0", "steps": 20})
    journal.add({"trial": 0, "step": 10, "value": 0.5})
    journal.add({"trial": 1, "values": {"a": 2}, "ended": "failed", "reason": "no such width"})
    journal.add({"trial": 0, "step": 20, "value": 0.7})
    journal.add({"trial": 0, "step": 10, "value": 0.6})
    journal.add({"trial": 0, "ended": "finished", "value": 0.75})
    assert Journal.read(tmp_path).trials == journal.trials
    first, second = journal.trials
    assert first == Trial(0, {"a": 1}, "r-0", 20, ((10, 0.6), (20, 0.7)), "finished", 0.75)
    assert (second.ended, second.reason, second.run) == ("failed", "no such width", "")


def test_half_a_line_of_a_driver_that_was_killed_is_forgotten(tmp_path: Path) -> None:
    Journal.read(tmp_path).add({"trial": 0, "values": {"a": 1}})
    with (tmp_path / trials.FILE).open("a") as file:
        file.write('{"trial": 0, "st')
    again = Journal.read(tmp_path)
    assert again.trials == [Trial(0, {"a": 1})]
    again.add({"trial": 0, "ended": "stopped"})
    assert Journal.read(tmp_path).trials[0].ended == "stopped"


@pytest.mark.parametrize(
    "line",
    ["{}", "nothing", '{"trial": 3, "ended": "failed"}', '{"trial": 0, "ended": "gone"}', '{"trial": 0, "x": 1}'],
)
def test_a_damaged_journal_is_refused_with_its_line(tmp_path: Path, line: str) -> None:
    (tmp_path / trials.FILE).write_text(f'{{"trial": 0, "values": {{}}}}\n{line}\n')
    with pytest.raises(DamagedJournal, match=r"trials\.jsonl:2 is damaged"):
        Journal.read(tmp_path)


KNOWN = [
    Trial(0, {"a": 0.1}, "r-0", 20, ((10, 0.5), (20, 0.6)), "finished", 0.6),
    Trial(1, {"a": 0.2}, "r-1", 20, ((10, 0.9),), "stopped", 0.9),
    Trial(2, {"a": 0.3}, "r-2", 20, (), "failed", None, "out of memory"),
    Trial(3, {"a": 0.4}, "r-3", 20, ((20, 0.7),), "finished", 0.7),
    Trial(4, {"a": 0.5}, "r-4", 20, (), "finished", math.nan),
]


def test_the_best_is_among_those_that_have_a_model() -> None:
    best = {mode: trials.best(KNOWN, mode) for mode in ("max", "min")}
    assert [found.number if found else None for found in best.values()] == [3, 0]
    assert trials.best(KNOWN[1:3], "max") is None
    assert trials.counts(KNOWN) == "3 finished, 1 stopped, 1 failed"


def test_the_table_names_all_trials_with_their_values() -> None:
    lines = report.as_csv(trials.rows(KNOWN[:3], "accuracy")).splitlines()
    assert lines == [
        "trial,run,ended,step,accuracy,a,reason",
        "1,r-0,finished,20,0.6,0.1,",
        "2,r-1,stopped,10,0.9,0.2,",
        "3,r-2,failed,0,,0.3,out of memory",
    ]


def test_the_pictures_are_pngs_and_there_are_none_of_nothing() -> None:
    fields = {"a": {"min": 0.05, "max": 0.6, "log": True}, "b": {"choices": ["x", [1]]}}
    known = [replace(trial, values={**trial.values, "b": [1]}) for trial in KNOWN]
    drawn = plots.pictures(known, sweep(fields=fields, trials=5), "max")
    assert set(drawn) == {"trials.png", "parallel.png"}
    assert all(content.startswith(b"\x89PNG") for content in drawn.values())
    assert plots.pictures(known[2:3], sweep(fields=fields, trials=5), "max") == {}


def test_the_command_sets_what_the_best_trial_had() -> None:
    spec = {"phase": "sweep", "model": {"architecture": "cnn", "from": None}}
    values = {"training.learning_rate": 1e-05, "training.betas": [0.9, 0.95], "training.schedule": "linear", "a": "on"}
    assert report.command(spec, values) == (
        "tandem jobs submit SPEC --set phase=pretrain --set sweep=null --set training.learning_rate=1e-05 "
        "--set 'training.betas=[0.9, 0.95]' --set training.schedule=linear "
        "--set 'a=\"on\"'"
    )


def test_what_a_trial_is_to_do_reaches_its_process(tmp_path: Path) -> None:
    part = Part(tmp_path / "s-t001", {"tandem.trial": "1"}, "digits", {"sweep": "s", "trial": 1, "values": {"a": [1]}})
    process.ask({"name": "x"}, tmp_path, part)
    assert process.asked(part.folder) == ({"name": "x"}, tmp_path, part)


@pytest.mark.parametrize(
    ("log", "code", "said"),
    [
        ("tandem: train 1/2\ntandem: error: data: x.csv:3 is empty\n", 2, "data: x.csv:3 is empty"),
        ("Traceback (most recent call last):\n  File\nRuntimeError: no\n\n", 1, "RuntimeError: no"),
        ("jobs.worker.errors.HangError: no step\nafterwards\n", 1, "jobs.worker.errors.HangError: no step"),
        ("", -9, "its driver was ended by SIGKILL"),
        ("tandem: train 1/2\n", 3, "its driver ended with exit code 3"),
    ],
)
def test_why_a_trial_failed_is_what_its_driver_said_last(log: str, code: int, said: str) -> None:
    assert process.last_word(log, code) == said


def test_a_line_of_the_live_table_is_read_back(capsys: pytest.CaptureFixture[str]) -> None:
    line = report.line(KNOWN[1], sweep(fields={"a": {"min": 0.0, "max": 1.0}}), is_best=False)
    trial_table.show(line)
    assert trial_table.parse(capsys.readouterr().out.strip()) == line
    assert trial_table.parse("tandem: trial by error") is None
    assert trial_table.sentence(line) == "trial 2/20 (a 0.2): stopped at step 10/20, accuracy 0.9"
    assert trial_table.sentence(replace(line, state="finished", best=True)).endswith("accuracy 0.9 (the best so far)")


def test_the_live_table_shows_those_that_run_first() -> None:
    spec = sweep(fields={"x.a": {"min": 0.0, "max": 1.0}}, trials=30)
    lines: list[TrialLine] = []
    for number in range(30):
        trial = Trial(number, {"x.a": number / 100}, "r", 20, ((10, 0.5),), None if number == 2 else "stopped", 0.5)
        lines.append(report.line(trial, spec, is_best=number == 5))
    table = trial_table.columns(lines)
    assert table[0] == ["trial", "a", "step", "accuracy", "state"]
    assert [row[0] for row in table[1:4]] == ["3", "6", "30"]
    assert table[1] == ["3", "0.02", "10/20", "0.5", "running"]
    assert table[2][-1] == "stopped ← best"
    assert len(table) == 1 + trial_table.MOST_ROWS


def test_a_trial_that_raises_ends_with_its_own_error(tmp_path: Path) -> None:
    folder = tmp_path / "s-t001"
    folder.mkdir()
    (folder / process.REQUEST).write_text("{}")
    code = process.TrialProcess(folder).wait()
    assert (code, process.reason(folder, code)) == (1, "KeyError: 'spec'")
