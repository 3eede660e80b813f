"""Two copies of a folder tell each other what has changed, and neither tells back what it was told."""

from __future__ import annotations

import os
import random
import shutil
import threading
from pathlib import Path

import pytest

from jobs.storage import changes
from jobs.storage.changes import Change, Copy
from jobs.storage.courier import is_note, is_taken_back


class Pair:
    """A driver's folder and a node's."""

    def __init__(self, root: Path) -> None:
        self.driver, self.node = root / "driver", root / "node"
        self.driver.mkdir()
        self.node.mkdir()
        self.of_driver, self.of_node = Copy(self.driver, is_note), Copy(self.node, lambda name: True)

    def passed(self) -> int:
        """Pass on what there is, once each way; return how many changes there were."""
        told = self.of_driver.pending()
        self.of_node.apply(told)
        back = self.of_node.pending()
        self.of_driver.apply(back)
        return len(told) + len(back)

    def settle(self) -> None:
        for _ in range(100):
            if not self.passed():
                return
        raise AssertionError("they tell each other the same for ever")


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


def replace(path: Path, content: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    aside = path.with_suffix(".partial")
    aside.write_bytes(content)
    os.replace(aside, path)


def add(path: Path, content: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("ab") as file:
        file.write(content)


def test_notes_go_to_the_node_and_what_workers_write_comes_back(pair: Pair) -> None:
    replace(pair.driver / "control.json", b"{}")
    replace(pair.driver / "lease" / "00000001.json", b"{}")
    add(pair.node / "logs" / "a-rank-1.log", b"one\n")
    replace(pair.node / "attempt.json", b"[1]")
    pair.settle()
    assert (pair.node / "control.json").read_bytes() == b"{}"
    assert (pair.node / "lease" / "00000001.json").exists()
    assert (pair.driver / "logs" / "a-rank-1.log").read_bytes() == b"one\n"
    assert (pair.driver / "attempt.json").read_bytes() == b"[1]"


def test_what_grows_is_told_by_what_was_added(pair: Pair) -> None:
    add(pair.node / "logs" / "a.log", b"x" * 1000)
    pair.settle()
    add(pair.node / "logs" / "a.log", b"more")
    (change,) = pair.of_node.pending()
    assert change == Change("logs/a.log", "more", b"more")
    pair.of_driver.apply([change])
    assert (pair.driver / "logs" / "a.log").read_bytes() == b"x" * 1000 + b"more"


def test_what_grows_on_both_sides_has_what_each_has_added(pair: Pair) -> None:
    add(pair.driver / "remarks.jsonl", b'"driver"\n')
    add(pair.node / "remarks.jsonl", b'"node"\n')
    pair.settle()
    for folder in (pair.driver, pair.node):
        assert sorted((folder / "remarks.jsonl").read_bytes().splitlines()) == [b'"driver"', b'"node"']


def test_a_log_that_another_node_had_begun_is_gone_on_with(pair: Pair) -> None:
    add(pair.driver / "spool" / "rank-0.jsonl", b"of the first node\n")
    pair.settle()
    assert not (pair.node / "spool").exists(), "the driver's spool is nothing to the node"
    add(pair.node / "spool" / "rank-0.jsonl", b"of the second\n")
    pair.settle()
    assert (pair.driver / "spool" / "rank-0.jsonl").read_bytes() == b"of the first node\nof the second\n"


def test_a_request_that_is_taken_back_by_a_worker_is_gone_at_the_driver_and_may_come_again(pair: Pair) -> None:
    for _ in range(2):
        (pair.driver / "SAVE").touch()
        pair.settle()
        (pair.node / "SAVE").unlink()
        pair.settle()
        assert not (pair.driver / "SAVE").exists()
    (pair.driver / "STOP").touch()
    pair.settle()
    (pair.driver / "STOP").unlink()
    pair.settle()
    assert not (pair.node / "STOP").exists()


def test_a_file_that_is_written_in_place_is_told_again_though_its_size_is_the_same(pair: Pair) -> None:
    for beat in (b"1", b"2"):
        (pair.node / "pulses").mkdir(exist_ok=True)
        (pair.node / "pulses" / "a-rank-1").write_bytes(beat)
        os.utime(pair.node / "pulses" / "a-rank-1", ns=(0, int(beat)))
        pair.settle()
        assert (pair.driver / "pulses" / "a-rank-1").read_bytes() == beat


def test_a_large_file_goes_in_pieces_and_is_there_whole_or_not(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "PIECE_BYTES", 10)
    content = bytes(range(95))
    replace(pair.node / "profile" / "trace.json.gz", content)
    for _ in range(9):
        assert pair.passed() == 1
        assert not (pair.driver / "profile" / "trace.json.gz").exists()
    pair.settle()
    assert (pair.driver / "profile" / "trace.json.gz").read_bytes() == content


def test_a_file_that_is_replaced_while_its_pieces_go_arrives_as_the_new_one(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changes, "PIECE_BYTES", 10)
    replace(pair.node / "profile" / "a.bin", b"a" * 55)
    pair.passed()
    pair.passed()
    replace(pair.node / "profile" / "a.bin", b"b" * 23)
    pair.settle()
    assert (pair.driver / "profile" / "a.bin").read_bytes() == b"b" * 23


def test_files_that_are_not_whole_are_not_told(pair: Pair) -> None:
    for name in ("status.partial", ".here-1", "new-ab12", "probe-12", "train.new"):
        (pair.node / name).write_bytes(b"x")
    assert pair.passed() == 0


def test_no_change_is_put_outside_of_the_folder(pair: Pair) -> None:
    for name in ("../outside", "/etc/outside", "logs/../../outside"):
        with pytest.raises(ValueError, match="no file of the folder"):
            pair.of_driver.apply([Change(name, "whole", b"x")])
    assert sorted(pair.driver.parent.iterdir()) == [pair.driver, pair.node]


def test_a_folder_that_has_gone_says_nothing_of_its_files(pair: Pair) -> None:
    replace(pair.node / "attempt.json", b"[1]")
    pair.settle()
    shutil.rmtree(pair.node)
    with pytest.raises(FileNotFoundError):
        pair.of_node.pending()
    assert (pair.driver / "attempt.json").exists()


def test_what_is_lost_on_a_node_is_not_removed_at_the_driver(pair: Pair) -> None:
    replace(pair.driver / "data.json", b"{}")
    (pair.driver / "SAVE").touch()
    pair.settle()
    (pair.node / "data.json").unlink()
    (pair.node / "SAVE").unlink()
    pair.of_driver.apply(pair.of_node.pending(), is_taken_back)
    assert (pair.driver / "data.json").exists()
    assert not (pair.driver / "SAVE").exists()


def test_what_is_told_while_a_node_tells_is_not_told_back_as_it_was(pair: Pair) -> None:
    """A courier is told and tells in threads of its own."""
    replace(pair.driver / "control.json", b"1")
    add(pair.driver / "remarks.jsonl", b"one\n")
    pair.settle()
    ending = threading.Event()
    told: list[Change] = []

    def tell() -> None:
        while not ending.is_set():
            told.extend(pair.of_node.pending())

    thread = threading.Thread(target=tell)
    thread.start()
    for number in range(200):
        replace(pair.driver / "control.json", b"%d" % number)
        add(pair.driver / "remarks.jsonl", b"%d\n" % number)
        pair.of_node.apply(pair.of_driver.pending())
    ending.set()
    thread.join()
    assert told == []


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_added_where_both_come_to_hold_all_of_it(pair: Pair, seed: int) -> None:
    draw, added = random.Random(seed), {"remarks.jsonl": [], "failures.jsonl": []}  # type: ignore[var-annotated]
    for number in range(200):
        side = draw.choice((pair.driver, pair.node))
        name = draw.choice(("control.json", "remarks.jsonl", "failures.jsonl", "SAVE"))
        if name.endswith(".jsonl"):
            added[name].append(b"%d of %s" % (number, side.name.encode()))
            add(side / name, added[name][-1] + b"\n")
        elif draw.random() < 0.3:
            (side / name).unlink(missing_ok=True)
        else:
            replace(side / name, b"%d" % number)
        if draw.random() < 0.3:
            pair.passed()
        if draw.random() < 0.1:
            pair.settle()
    pair.settle()
    for name, lines in added.items():
        for folder in (pair.driver, pair.node):
            assert sorted((folder / name).read_bytes().splitlines()) == sorted(lines)
