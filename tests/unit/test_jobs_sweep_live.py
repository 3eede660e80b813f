"""The table of a sweep's trials, as whoever follows the job sees it."""

from __future__ import annotations

import contextlib
import io

import pytest

from jobs import trial_table
from jobs.live import LiveView
from jobs.trial_table import TrialLine


def lines() -> list[str]:
    written = io.StringIO()
    with contextlib.redirect_stdout(written):
        for number, value in enumerate((0.5, 0.8, 0.6)):
            for step, state in ((10, "running"), (30, "finished")):
                values = {"training.learning_rate": 1e-3 * (number + 1)}
                best = state == "finished" and number < 2
                trial_table.show(TrialLine(number, 3, state, step, 30, "accuracy", value, values, best))
    return written.getvalue().splitlines()


def followed() -> None:
    with LiveView("job-1") as view:
        for line in lines():
            view.line(line, None)


def test_a_log_gets_a_sentence_for_each_trial_that_ends(capsys: pytest.CaptureFixture[str]) -> None:
    followed()
    ended = [line for line in capsys.readouterr().err.splitlines() if "finished" in line]
    assert ended == [
        "trial 1/3 (learning_rate 0.001): finished, accuracy 0.5 (the best so far)",
        "trial 2/3 (learning_rate 0.002): finished, accuracy 0.8 (the best so far)",
        "trial 3/3 (learning_rate 0.003): finished, accuracy 0.6",
    ]


def test_a_terminal_gets_the_table_which_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "dumb")
    followed()
    left = [line.split() for line in terminal.getvalue().splitlines()]
    assert left[-4:] == [
        ["trial", "learning_rate", "step", "accuracy", "state"],
        ["2", "0.002", "30/30", "0.8", "finished", "←", "best"],
        ["3", "0.003", "30/30", "0.6", "finished"],
        ["1", "0.001", "30/30", "0.5", "finished"],
    ]
