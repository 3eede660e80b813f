"""What a preparation keeps in a store: taken over by another machine as far as it is whole, and of the same files."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster import stores
from jobs.checkpoint.store import Store
from jobs.data import prepare, stored, unfinished
from jobs.data.arrivals import Arrivals, sign_of
from jobs.data.examples import Source
from jobs.data.file_digests import file_digest
from jobs.data.prepare import Prepared
from jobs.data.stored_work import StoredWork, are_as, looks_of
from tests.support import s3_server, slow_preparation
from tests.support.s3_server import S3Server

NAME = "0123456789abcdef"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    monkeypatch.setattr(stores, "PAUSE_S", 0.0)
    with s3_server.running(monkeypatch) as found:
        yield found


def work_of(server: S3Server) -> StoredWork:
    return StoredWork(server.uri("bucket/tandem"), NAME, "")


def machine(folder: Path) -> Path:
    """Return the folder of a preparation on a machine that has nothing of it yet."""
    place = folder / f"{NAME}.partial"
    for name in (unfinished.SURVEYS, unfinished.RECORDS, unfinished.PULSES, "task"):
        (place / name).mkdir(parents=True)
    return place


def encoded(work: StoredWork, place: Path, name: str, content: bytes) -> str:
    """Make a file of rows, as a task does; return its digest."""
    (place / name).write_bytes(content)
    digest = file_digest(place / name)
    work.keep(place, name, {"digest": digest, "examples": 3})
    return digest


def begun(server: S3Server, place: Path) -> StoredWork:
    """Begin a preparation that surveys a range, learns, and encodes two chunks."""
    work = work_of(server).laid_out("a layout", place)
    survey = place / unfinished.SURVEYS / "train" / "000000.npz"
    survey.parent.mkdir()
    survey.write_bytes(b"hashes")
    work.keep_survey(survey)
    (place / "task" / "labels.json").write_text("[]")
    unfinished.keep_learned(place, ["said"])
    return work.taught(place)


def test_another_machine_takes_over_surveys_what_was_learned_and_records(server: S3Server, tmp_path: Path) -> None:
    first, second = machine(tmp_path / "a"), machine(tmp_path / "b")
    work = begun(server, first)
    digest = encoded(work, first, "train-00000.arrow", b"rows")
    again = work_of(server).laid_out("a layout", second)
    assert (second / unfinished.SURVEYS / "train" / "000000.npz").read_bytes() == b"hashes"
    assert unfinished.learned(second) == ["said"]
    again = again.taught(second)
    assert again.finished(second, "train-00000.arrow") == {"digest": digest, "examples": 3}
    assert again.finished(second, "train-00001.arrow") is None
    again.bring_rows(second, {"train-00000.arrow": digest})
    assert (second / "train-00000.arrow").read_bytes() == b"rows"
    other = work_of(server).laid_out("another layout", machine(tmp_path / "c"))
    assert other.layout != again.layout
    assert not list((tmp_path / "c").rglob("*.npz")), "other ranges take over nothing"


def test_a_file_without_a_record_and_one_by_another_task_are_not_taken(server: S3Server, tmp_path: Path) -> None:
    place = machine(tmp_path / "a")
    work = begun(server, place)
    encoded(work, place, "train-00000.arrow", b"rows")
    (record,) = [key for key in server.objects if "/finished/" in key]
    content = server.objects.pop(record)
    second = machine(tmp_path / "b")
    again = work_of(server).laid_out("a layout", second).taught(second)
    assert again.finished(second, "train-00000.arrow") is None
    server.objects[record] = content
    (second / "task" / "labels.json").write_text('["other"]')
    unfinished.keep_learned(second, [])
    taught = work_of(server).laid_out("a layout", second).taught(second)
    assert taught.learned != work.learned
    assert taught.finished(second, "train-00000.arrow") is None


def test_what_a_killed_driver_had_only_on_its_disk_is_stored_by_the_next(server: S3Server, tmp_path: Path) -> None:
    place = machine(tmp_path / "a")
    work = begun(server, place)
    (place / "train-00000.arrow").write_bytes(b"rows")
    record = {"digest": file_digest(place / "train-00000.arrow"), "examples": 3}
    unfinished.keep_record(place, "train-00000.arrow", record)
    assert work.finished(place, "train-00000.arrow") == record
    assert [key for key in server.objects if key.endswith(".arrow")]
    assert [key for key in server.objects if "/finished/" in key]


def test_what_tasks_have_stored_is_not_stored_twice_and_fetched_under_its_name(
    server: S3Server, tmp_path: Path
) -> None:
    place = machine(tmp_path / "a")
    work = begun(server, place)
    digest = encoded(work, place, "train-00000.arrow", b"rows")
    unfinished.done(place)
    (place / "meta.json").write_text("{}")
    whole = place.rename(place.with_name(NAME))
    store = Store(server.uri("bucket/tandem"))
    stored.push(store, whole)
    arrows = [key.rpartition("/")[2] for key in server.objects if key.endswith(".arrow")]
    assert arrows == [f"train-00000.{digest[:12]}.arrow"]
    assert not [key for key in server.objects if ".partial/" in key and not key.endswith("/")]
    index = json.loads(server.objects[f"bucket/tandem/data/{NAME}/files.json"])
    assert index["train-00000.arrow"] == [4, digest, arrows[0]]
    there = tmp_path / "there" / NAME
    assert stored.fetch(store, there)
    assert (there / "train-00000.arrow").read_bytes() == b"rows"


def test_columns_beside_the_rows_are_fetched_when_all_are_stored(server: S3Server, tmp_path: Path) -> None:
    store, here, there = Store(server.uri("bucket/tandem")), tmp_path / "a" / NAME, tmp_path / "b" / NAME
    for folder in (here / "reference-1", there):
        folder.mkdir(parents=True)
    (here / "reference-1" / "train-00000.arrow").write_bytes(b"columns")
    made = {"train-00000.arrow": stored.put_columns(store, here, "reference-1", here / "reference-1/train-00000.arrow")}
    assert not stored.fetch_columns(store, there, "reference-1"), "it is not said that they are all"
    stored.push_columns(store, here, "reference-1", made)
    assert stored.fetch_columns(store, there, "reference-1")
    assert (there / "reference-1" / "train-00000.arrow").read_bytes() == b"columns"


def test_a_file_of_the_same_name_is_another_one_by_its_size_or_time(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("{}")
    looks = looks_of(Source("x", "", lambda: iter(()), origin=str(path), size=2))
    assert are_as(looks)
    assert not are_as({name: (size, time + 1) for name, (size, time) in looks.items()})
    path.write_text("{ }")
    assert not are_as(looks)
    path.unlink()
    assert not are_as(looks)
    assert are_as(looks_of(Source("x", "", lambda: iter(()), origin="s3://bucket/x", size=2)))


def test_a_list_that_nodes_have_copies_of_tells_digests_and_signs_of_life(tmp_path: Path) -> None:
    arrivals = Arrivals(tmp_path / "arrivals.jsonl", carried=True)
    arrivals.add("train-00000.arrow", 3, "abc")
    assert json.loads(arrivals.path.read_text()) == ["train-00000.arrow", 3, "abc"]
    sign = sign_of(arrivals.path)
    before = sign()
    arrivals.beat()
    assert sign() != before
    assert (tmp_path / "arrivals.beat").read_text(), "what is in a file gets to other nodes, its time alone does not"


def test_a_preparation_that_fails_by_its_data_leaves_nothing_in_the_store(server: S3Server, tmp_path: Path) -> None:
    place = machine(tmp_path / "a")
    encoded(begun(server, place), place, "train-00000.arrow", b"rows")
    stored.forget(Store(server.uri("bucket/tandem")), NAME)
    assert [key for key in server.objects if not key.endswith("/")] == []
    assert replace(work_of(server)).laid_out("a layout", machine(tmp_path / "b")).known == frozenset()


def test_of_two_preparations_of_the_same_data_the_end_of_one_ends_not_the_other(
    server: S3Server, tmp_path: Path
) -> None:
    first, second = machine(tmp_path / "a"), machine(tmp_path / "b")
    work = begun(server, first)
    encoded(work, first, "train-00000.arrow", b"rows")
    other = work_of(server).laid_out("a layout", second).taught(second)
    assert other.known == {"train-00000.arrow"}
    unfinished.done(first)
    (first / "meta.json").write_text("{}")
    store, whole = Store(server.uri("bucket/tandem")), first.rename(first.with_name(NAME))
    stored.push(store, whole)
    assert other.finished(second, "train-00000.arrow") is None, "it encodes it itself"
    encoded(other, second, "train-00000.arrow", b"rows")
    assert [key for key in server.objects if ".partial/" in key and not key.endswith("/")]
    stored.push(store, whole)
    assert not [key for key in server.objects if ".partial/" in key and not key.endswith("/")]


class Beside:
    """Who would train meanwhile, for a preparation that does not come so far."""

    seed, taken_cpus = 0, 0.0

    def arrived(self, file: str, rows: int, digest: str) -> None:
        raise AssertionError("all of it is there at once")

    def check(self) -> None:
        pass

    def failed(self) -> None:
        raise AssertionError("nothing fails")


@pytest.mark.parametrize("beside", [None, Beside()])
def test_who_misses_what_another_has_removed_at_its_end_takes_what_that_has_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beside: Beside | None
) -> None:
    slow_preparation.lay_out(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_slow", raising=False)
    faster = slow_preparation.made(tmp_path, "faster", slow_preparation.HERE)
    missed: list[str] = []

    def on_progress(phase: str, *_: object) -> None:
        missed.append(phase)
        raise FileNotFoundError("data/0.partial/surveys/train/000000.npz")

    def stages(storage: str, is_stored: bool) -> list[Prepared]:
        def fetch(directory: Path) -> bool:
            if not (missed and is_stored):
                return False
            shutil.copytree(faster.directory, directory)
            return True

        missed.clear()
        how: dict[str, Any] = {"parent": None, "on_progress": on_progress, "sizes": slow_preparation.HERE}
        spec = slow_preparation.spec_of()
        return list(prepare.stages(spec, tmp_path, tmp_path / storage, **how, fetch=fetch, overlap=beside))

    (taken,) = stages("slower", True)
    assert missed
    assert replace(taken, directory="") == replace(faster, directory="", cached=True)
    assert [path.name for path in (tmp_path / "slower" / "data").iterdir()] == [taken.digest[:16]]
    with pytest.raises(FileNotFoundError):
        stages("alone", False)
