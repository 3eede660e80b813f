"""The protocol of a run's folder: what one process notes, another reads, and nothing half-written."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jobs.claim import claim
from jobs.lease import RunIsOwned
from jobs.notes import DamagedNote
from jobs.run_folder import RunFolder
from jobs.run_notes import Attempt, Control, Saves
from jobs.spec import JobSpec
from tracking.spool import Spool

SPEC = JobSpec.model_validate(
    {"name": "n", "phase": "evaluate", "model": {"from": "models:/a@b"}, "data": {"eval": "x"}}
)


def test_notes_come_back_as_they_were_written(tmp_path: Path):
    folder = RunFolder(tmp_path)
    assert (folder.attempt(), folder.control(), folder.status()) == (None, Control(), None)
    attempt, control = Attempt("a1", 2, 4, True, ("n1", "n2"), (11, 12), (0, 3)), Control((3, 4), 2, ("n1",))
    folder.write_attempt(attempt)
    folder.write_control(control)
    folder.write_status("RUNNING")
    assert (folder.attempt(), folder.control(), folder.status()) == (attempt, control, "RUNNING")


def test_a_new_attempt_at_a_job_keeps_what_was_skipped_and_forgets_nodes_and_requests(tmp_path: Path):
    folder = RunFolder(tmp_path)
    folder.write_control(Control((3,), 2, ("n1",)))
    folder.request_stop()
    folder.request_save()
    folder.add_failure({"kind": "hang"})
    folder.begin()
    assert folder.control() == Control((3,), 2, ())
    assert [folder.stop_requested(), folder.save_requested(), folder.failures()] == [False, False, []]


def test_a_run_without_held_out_rows_has_ended_all_the_same(tmp_path: Path):
    folder = RunFolder(tmp_path)
    assert folder.evaluations() is None
    folder.write_evaluations({})
    assert folder.evaluations() == {}


def test_the_last_step_is_found_behind_a_line_that_is_being_written(tmp_path: Path):
    folder = RunFolder(tmp_path)
    assert folder.last_step() == 0
    folder.spool.mkdir()
    folder.rank_0_spool.write_text('{"step": 7, "loss": 1.0}\n{"step": 7, "eval_x": 1}\n{"step": 8, "lo')
    assert folder.last_step() == 7


def test_an_unfinished_run_goes_on_and_a_finished_one_is_never_written_again(tmp_path: Path):
    first, owned = claim(tmp_path, SPEC)
    first.write_status("KILLED")
    owned.release()
    again, owned = claim(tmp_path, SPEC)
    assert again == RunFolder(first.path, resumed=True)
    first.write_status("FINISHED")
    owned.release()
    second, _ = claim(tmp_path, SPEC)
    assert (second.path != first.path, second.resumed) == (True, False)


def test_how_saving_went_is_counted_over_the_starts_of_a_group(tmp_path: Path):
    folder = RunFolder(tmp_path)
    assert folder.saves() == Saves()
    for error in (None, "no space", None, "read-only"):
        folder.note_save(error)
    assert folder.saves() == Saves(saved=2, failed=2, error="read-only")
    folder.begin()
    assert folder.saves() == Saves()


def test_a_failure_half_written_is_not_read(tmp_path: Path):
    folder = RunFolder(tmp_path)
    folder.add_failure({"kind": "hang"})
    with (tmp_path / "failures.jsonl").open("a") as file:
        file.write('{"kind": "wor')
    assert folder.failures() == [{"kind": "hang"}]


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_several_that_claim_at_once_do_not_share_a_folder(tmp_path: Path, resume):
    spec = SPEC.model_copy(update={"checkpoint": SPEC.checkpoint.model_copy(update={"resume": resume})})
    together = threading.Barrier(6)

    def attempt(_: int) -> Path | None:
        together.wait()
        try:
            return claim(tmp_path, spec)[0].path
        except RunIsOwned:
            return None

    with ThreadPoolExecutor(6) as pool:
        found = [path for path in pool.map(attempt, range(6)) if path is not None]
    assert len(found) == (1 if resume == "auto" else 6)
    assert sorted(found) == sorted((tmp_path / "runs").iterdir())


@pytest.mark.parametrize("content", ["", "{", "[1]", "null"])
def test_a_damaged_note_is_named_and_nothing_begins(tmp_path: Path, content: str):
    folder = RunFolder(tmp_path)
    folder.write_status("KILLED")
    (tmp_path / "control.json").write_text(content)
    with pytest.raises(DamagedNote, match=r"control\.json is damaged .*checkpoint\.resume=never"):
        folder.begin()
    assert folder.status() == "KILLED"


def test_half_lines_anywhere_are_passed_over(tmp_path: Path):
    folder = RunFolder(tmp_path)
    (tmp_path / "failures.jsonl").write_text('{"kind": "hang"}\n{"a}\n{"kind": "storage"}\n')
    (tmp_path / "remarks.jsonl").write_text('"first"\n"half\n{"\n"ha"lf"\n"last"\n')
    folder.spool.mkdir()
    folder.rank_0_spool.write_text('{"step": 3, "metrics": {"loss": 1}}\n{"loss": 1}\n{"step": 4, "loss}\n')
    assert [failure["kind"] for failure in folder.failures()] == ["hang", "storage"]
    assert folder.remarks() == ["first", "last"]
    assert folder.last_step() == 3


@pytest.mark.parametrize("name", ["attempt", "saves", "control", "data"])
def test_a_note_with_other_fields_is_named(tmp_path: Path, name: str):
    (tmp_path / f"{name}.json").write_text('{"strange": 1}')
    with pytest.raises(DamagedNote, match=rf"{name}\.json is damaged .*'strange'"):
        getattr(RunFolder(tmp_path), name)()


@pytest.mark.parametrize("content", ['{"precision": "fp16"}', '{"precision": null}', '{"precison": "bf16"}'])
def test_a_precision_that_is_none_is_named(tmp_path: Path, content: str):
    (tmp_path / "precision.json").write_text(content)
    with pytest.raises(DamagedNote, match=r"precision\.json is damaged .*bf16, fp32.*checkpoint\.resume=never"):
        RunFolder(tmp_path).precision()


def test_metrics_that_the_disk_did_not_take_are_counted_in_the_run(tmp_path: Path):
    from jobs.worker.loop import close_spool

    folder = RunFolder(tmp_path)
    folder.rank_0_spool.mkdir(parents=True)  # a folder where the file belongs
    spool = Spool(folder.rank_0_spool)
    close_spool(spool, folder)
    assert folder.remarks() == []
    for step in (1, 2):
        spool.append(step, {"loss": 1.0})
    close_spool(spool, folder)
    assert folder.remarks() == ["2 lines of metrics are missing: the disk did not take them"]
