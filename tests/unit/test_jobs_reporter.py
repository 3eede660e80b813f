"""What the driver tells about failures."""

from pathlib import Path
from typing import Any

from jobs.driver.reporter import FolderWatch, _report_step
from jobs.run_folder import RunFolder
from tracking.spool import Record

ENTRY = {
    "kind": "non-finite loss",
    "rank": 0,
    "step": 14,
    "time": 1.0,
    "message": "the loss of step 15 is nan",
    "action": "stop",
    "reason": "failures.non_finite is `stop`",
    "checkpoint": 10,
}


def test_a_failure_noted_just_before_the_end_is_told_before_the_end(tmp_path: Path, capsys: Any) -> None:
    asked: list[Any] = []
    watch = FolderWatch(RunFolder(tmp_path), asked.append)
    RunFolder(tmp_path).add_failure(ENTRY)
    watch.finish()
    assert len(asked) == 2, "the page and the count"
    assert "non-finite loss on rank 0 after step 14 → stop" in capsys.readouterr().out
    RunFolder(tmp_path).add_failure(ENTRY)
    watch.finish()
    assert len(asked) == 2, "afterwards nothing is asked for: nobody would send it"


def test_what_workers_remark_is_said_once_and_kept_with_the_run(tmp_path: Path, capsys: Any) -> None:
    asked: list[Any] = []
    RunFolder(tmp_path).add_remarks(["the head is random", "rows hold one conversation each"])
    RunFolder(tmp_path).add_remarks(["the head is random"])  # by the next start of the group
    watch = FolderWatch(RunFolder(tmp_path), asked.append)
    RunFolder(tmp_path).add_remarks(["skipped checkpoint step-5: damaged"])
    watch.finish()
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("tandem: ")]
    assert said == [
        "tandem: the head is random",
        "tandem: rows hold one conversation each",
        "tandem: skipped checkpoint step-5: damaged",
    ]
    assert asked, "the run is told"
    assert len(RunFolder(tmp_path).remarks()) == 3


def test_a_line_of_progress_has_the_rate_of_what_is_learned_and_no_flops(capsys: Any) -> None:
    metrics = {"loss": 2.5, "tokens_per_second": 800.0, "model_flops_per_second": 3e12, "step_time_s": 0.5}
    _report_step(Record(3, metrics, 0, "rank-0"), 9)
    (line,) = capsys.readouterr().out.splitlines()
    assert line == "tandem: train 3/9 loss=2.5 tokens_per_second=800 eta_s=3"


def test_what_auto_came_to_is_logged_once_as_a_param(tmp_path: Path) -> None:
    asked: list[Any] = []
    watch = FolderWatch(RunFolder(tmp_path), asked.append, {"training": {"micro_batch_size": "auto", "deepspeed": "x"}})
    RunFolder(tmp_path).choices.keep_micro_batch(2, 16)
    watch.finish()
    logged: list[Any] = []
    run = type("Run", (), {"log_params": lambda self, params: logged.append(params)})()
    for call in asked:
        call(run)
    assert logged == [{"training": {"micro_batch_size": 16}}]
    watch.finish()
    assert len(asked) == 1, "nothing new"
