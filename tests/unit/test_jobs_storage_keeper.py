"""A run's notes are in the store as they are in its folder, soon, and again after the store was away."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.checkpoint.store import Store
from jobs.storage import keeper
from jobs.storage.changes import Look
from jobs.storage.keeper import Keeper, NotKept, Stored, due
from tests.support import s3_server
from tests.support.s3_server import S3Server

KEY = "runs/a-12345678-1"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    with s3_server.running(monkeypatch) as found:
        yield found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / KEY / "logs").mkdir(parents=True)
    return tmp_path / KEY


def look(size: int, changed: int = 0) -> Look:
    return Look(1, size, changed)


def test_small_files_are_due_at_once_and_those_that_grow_later() -> None:
    found = {"status.json": look(10, 1), "logs/a.log": look(1050, 1), "model/config.json": look(5), "pulses/a": look(1)}
    stored = {"status.json": Stored(look(10), 0.0), "logs/a.log": Stored(look(1000), 0.0)}
    assert due(found, stored, 1.0, final=False) == ["status.json"]
    assert due(found, stored, 31.0, final=False) == ["status.json", "logs/a.log"]
    assert due(found, stored, 1.0, final=True) == ["status.json", "logs/a.log"]
    assert due({"logs/a.log": look(1200, 1)}, stored, 1.0, final=False) == ["logs/a.log"]
    assert due(found, {}, 0.0, final=False) == ["status.json", "logs/a.log"], "what is new is stored at once"
    assert due({"logs/a.log": look(1000)}, stored, 99.0, final=True) == []


def test_notes_come_back_on_another_machine_as_they_were(server: S3Server, folder: Path, tmp_path: Path) -> None:
    uri = server.uri("bucket/tandem")
    (folder / "status.json").write_text("{}")
    (folder / "logs" / "a.log").write_text("one\n")
    Keeper(uri, folder).settle()
    elsewhere = tmp_path / "other" / folder.name
    elsewhere.mkdir(parents=True)
    (elsewhere / "failures.jsonl").write_text("of an attempt that is over\n")
    other = Keeper(uri, elsewhere)
    other.bring()
    left = {path.relative_to(elsewhere).as_posix(): path.read_text() for path in elsewhere.rglob("*") if path.is_file()}
    assert left == {"status.json": "{}", "logs/a.log": "one\n"}
    parts = server.parts
    assert other.look(final=True) is None
    assert server.parts == parts, "what was brought is not stored again"


def test_what_is_removed_is_removed_there(server: S3Server, folder: Path) -> None:
    uri = server.uri("bucket/tandem")
    kept = Keeper(uri, folder)
    (folder / "STOP").touch()
    (folder / "status.json").write_text("{}")
    kept.settle()
    assert Store(uri).exists(f"{KEY}/STOP")
    (folder / "STOP").unlink()
    kept.settle()
    assert Store(uri).tree(KEY) == ["status.json"]


def test_a_store_that_is_away_is_said_once_and_gets_everything_later(server: S3Server, folder: Path) -> None:
    said: list[str] = []
    kept = Keeper(server.uri("refused/tandem"), folder, said.append)
    (folder / "status.json").write_text("{}")
    assert kept.look() is not None
    assert kept.look() is not None
    assert len(said) == 1
    assert "does not take the run's notes" in said[0]
    kept._store = Store(server.uri("bucket/tandem"))  # it is back
    assert kept.look() is None
    assert len(said) == 2
    assert Store(server.uri("bucket/tandem")).exists(f"{KEY}/status.json")


def test_the_end_of_a_job_whose_notes_are_not_taken_says_where_they_are(
    server: S3Server, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "LOOK_S", 0.01)
    (folder / "status.json").write_text("{}")
    with pytest.raises(
        NotKept, match=f"could not be stored in s3://refused/tandem/{KEY}: .* it is in {folder}"
    ) as told:
        Keeper(server.uri("refused/tandem"), folder).settle(0.0)
    assert told.value.exit_code == 1


def test_a_thread_stores_what_changes(server: S3Server, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "LOOK_S", 0.01)
    uri = server.uri("bucket/tandem")
    kept = Keeper(uri, folder)
    kept.start()
    (folder / "attempt.json").write_text("[]")
    enough = time.monotonic() + 30
    while not Store(uri).exists(f"{KEY}/attempt.json"):
        assert time.monotonic() < enough
        time.sleep(0.01)
    kept.stop()


def test_a_folder_that_has_gone_takes_nothing_from_the_store(server: S3Server, folder: Path) -> None:
    uri = server.uri("bucket/tandem")
    kept = Keeper(uri, folder, lambda sentence: None)
    (folder / "status.json").write_text("{}")
    kept.settle()
    shutil.rmtree(folder)
    assert kept.look(final=True) is not None
    assert Store(uri).tree(KEY) == ["status.json"]


def test_who_has_lost_the_run_stores_nothing(server: S3Server, folder: Path) -> None:
    uri = server.uri("bucket/tandem")
    (folder / "status.json").write_text("of the one that has it")
    Keeper(uri, folder).settle()
    (folder / "status.json").write_text("of one that had it")
    late = Keeper(uri, folder, lambda sentence: None, is_mine=lambda: False)
    assert "another job has the run" in str(late.look(final=True))
    assert Store(uri).read(f"{KEY}/status.json") == b"of the one that has it"


def test_what_only_this_machine_has_of_its_own_last_attempt_is_stored_and_not_replaced(
    server: S3Server, folder: Path
) -> None:
    uri = server.uri("bucket/tandem")
    (folder / "status.json").write_text("RUNNING")
    Keeper(uri, folder).settle()
    (folder / "status.json").write_text("FINISHED")  # while the store was away
    (folder / "version.json").write_text("waits")
    again = Keeper(uri, folder)
    again.bring(newest=True)
    again.settle()
    assert Store(uri).read(f"{KEY}/status.json") == b"FINISHED"
    assert Store(uri).exists(f"{KEY}/version.json")
