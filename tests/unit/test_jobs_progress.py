"""What a job prints of how far it is, read back by whoever follows it."""

from __future__ import annotations

import math

import pytest

from jobs import progress


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"loss": 0.5, "eta_s": 1e-7},
        {"eval_macro_f1": 0.25, "eval_calibration_error": 0.1},
        {"eval_recall@5": 1e20, "eval_BLEU": -3.0},
        {"loss": math.inf, "grad_norm": -math.inf},
    ],
)
def test_progress_is_read_back_whatever_its_metrics_are_called(
    values: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    progress.report("evaluate", 3, 10, **values)
    assert progress.parse(capsys.readouterr().out) == progress.Progress("evaluate", 3, 10, values)


@pytest.mark.parametrize("sentence", ["write 1/2 as key=value", "said 1/2 key=value", "evaluate 1/2 loss=", "1/2"])
def test_a_sentence_is_no_progress(sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    progress.say(sentence)
    assert progress.parse(capsys.readouterr().out) is None
