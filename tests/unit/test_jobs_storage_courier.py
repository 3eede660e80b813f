"""A courier makes a node's copy of a run's folder what the driver's is, and says so to workers of that node alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.errors import UserError
from jobs.storage.arrival import await_copy, drivers, here
from jobs.storage.changes import Change, Copy
from jobs.storage.courier import Bring, Courier, is_note

NOTES = [Change("control.json", "whole", b"{}"), Change("remarks.jsonl", "more", b'"said"\n')]


def bring(path: Path, content: str) -> None:
    path.write_text(content)


def refuse() -> None:
    raise UserError("data: the disk is full")


def test_a_copy_is_the_drivers_folder_and_what_workers_need_is_there_before_it_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a-1"
    courier = Courier(str(folder), "token", "node")
    assert not courier.is_shared()
    courier.begin(NOTES, [Bring(bring, (tmp_path / "data", "rows"))])
    assert (tmp_path / "data").read_text() == "rows"
    assert (folder / "control.json").read_bytes() == b"{}"
    assert courier.take(0.0) == [], "what it was told it does not tell back"
    await_copy(folder, "token", "node")
    (folder / "attempt.json").write_text("[1]")
    assert courier.take(0.0) == [Change("attempt.json", "whole", b"[1]")]


def test_what_an_earlier_attempt_left_on_the_node_is_gone(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "old-rank-0.log").write_text("of before")
    (tmp_path / "STOP").touch()
    Courier(str(tmp_path), "token", "node").begin(NOTES, [])
    assert not (tmp_path / "STOP").exists()
    assert not (tmp_path / "logs" / "old-rank-0.log").exists()


def test_a_node_that_comes_back_does_not_take_its_old_copy_for_a_new_one(tmp_path: Path) -> None:
    Courier(str(tmp_path), "token", "before").begin(NOTES, [])
    again = Courier(str(tmp_path), "token", "after")
    assert not again.is_shared(), "the driver's folder is elsewhere"
    assert not here(tmp_path, "token", "after").exists()
    again.begin(NOTES, [])
    assert not here(tmp_path, "token", "before").exists()
    await_copy(tmp_path, "token", "after")


def test_a_node_that_sees_the_drivers_folder_shares_it(tmp_path: Path) -> None:
    drivers(tmp_path, "token").touch()
    assert Courier(str(tmp_path), "token", "node").is_shared()
    assert not Courier(str(tmp_path), "another", "node").is_shared()
    await_copy(tmp_path, "token", "node")


def test_two_nodes_with_one_folder_that_is_not_the_drivers_are_told(tmp_path: Path) -> None:
    Courier(str(tmp_path), "token", "one").begin(NOTES, [], ["one", "other"])
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "a-rank-0.log").write_text("of a worker there")
    with pytest.raises(UserError, match="one folder for two nodes"):
        Courier(str(tmp_path), "token", "other").begin(NOTES, [], ["one", "other"])
    assert (tmp_path / "logs" / "a-rank-0.log").exists()
    Courier(str(tmp_path), "token", "other").begin(NOTES, [], ["other"])  # the first one was lost


def test_workers_of_a_node_that_cannot_get_what_they_need_are_told_why(tmp_path: Path) -> None:
    courier = Courier(str(tmp_path), "token", "node")
    with pytest.raises(UserError, match="the disk is full"):
        courier.begin(NOTES, [Bring(refuse)])
    with pytest.raises(UserError, match="this node could not get what the job needs: data: the disk is full"):
        await_copy(tmp_path, "token", "node")


def test_a_folder_that_cannot_be_made_is_told_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written on this node: .* set TANDEM_HOME"):
        Courier(str(tmp_path / "file" / "run"), "token", "node").begin(NOTES, [])


def test_a_courier_that_is_started_again_tells_what_is_missing_and_nothing_twice(tmp_path: Path) -> None:
    driver, node = tmp_path / "driver", tmp_path / "node"
    driver.mkdir()
    (driver / "remarks.jsonl").write_text('"said"\n')
    copy = Copy(driver, is_note)
    lost = Courier(str(node), "token", "node")
    lost.begin(copy.pending(), [])
    (node / "logs").mkdir()
    (node / "logs" / "a-rank-1.log").write_text("one\n")
    copy.apply(lost.take(0.0))
    assert lost.take(0.0) == [], "by which it knows that the driver has that"
    with (node / "logs" / "a-rank-1.log").open("a") as file:
        file.write("two\n")
    (node / "evaluations.json").write_text("{}")
    with (node / "remarks.jsonl").open("a") as file:
        file.write('"of a worker"\n')
    (driver / "control.json").write_text("{}")
    told = copy.pending()  # which the lost one has not done
    again = Courier(str(node), "token", "node")
    again.again(told)
    assert (node / "control.json").read_text() == "{}"
    copy.apply(again.take(0.0))
    assert (driver / "logs" / "a-rank-1.log").read_text() == "one\ntwo\n"
    assert (driver / "evaluations.json").read_text() == "{}"
    assert (driver / "remarks.jsonl").read_text() == '"said"\n"of a worker"\n'
    assert again.take(0.0) == []
    assert copy.pending() == []
    with pytest.raises(UserError, match=r"what a courier has noted in .* cannot be read"):
        Courier(str(tmp_path / "none"), "token", "node").again([])
