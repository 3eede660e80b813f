"""Prepared data is stored once and fetched whole, or not at all, by each node."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import stores
from cluster.errors import UserError
from jobs.checkpoint.store import Store
from jobs.data import stored
from tests.support import s3_server
from tests.support.s3_server import S3Server

NAME = "0123456789abcdef"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    monkeypatch.setattr(stores, "PAUSE_S", 0.0)
    with s3_server.running(monkeypatch) as found:
        yield found


@pytest.fixture
def made(tmp_path: Path) -> Path:
    folder = tmp_path / "here" / NAME
    (folder / "task").mkdir(parents=True)
    (folder / "train-00000.arrow").write_bytes(bytes(range(256)) * 100)
    (folder / "task" / "labels.json").write_text("[]")
    (folder / "reference-1").mkdir()
    (folder / "reference-1" / "train-00000.arrow").write_bytes(b"of a model")
    (folder / "meta.json").write_text("{}")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_node_has_what_was_stored(server: S3Server, made: Path, tmp_path: Path) -> None:
    store, there = Store(server.uri("bucket/tandem")), tmp_path / "there" / NAME
    assert not stored.fetch(store, there), "nothing is stored yet"
    assert not there.exists()
    stored.push(store, made)
    told: list[tuple[int, int]] = []
    assert stored.fetch(store, there, lambda done, total: told.append((done, total)))
    wanted = files(made)
    del wanted["reference-1/train-00000.arrow"]
    assert files(there) == wanted
    assert told[-1][0] == told[-1][1] == sum(map(len, wanted.values()))


def test_it_is_fetched_once_by_all_that_want_it_on_a_node(server: S3Server, made: Path, tmp_path: Path) -> None:
    store, there = Store(server.uri("bucket/tandem")), tmp_path / "there" / NAME
    stored.push(store, made)
    before = server.sent
    threads = [threading.Thread(target=stored.fetch, args=(store, there)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    once = sum(len(content) for name, content in files(made).items() if not name.startswith("reference"))
    assert once <= server.sent - before < 2 * once
    assert (there / "meta.json").is_file()


def test_what_is_stored_is_not_stored_again(server: S3Server, made: Path) -> None:
    store = Store(server.uri("bucket/tandem"))
    stored.push(store, made)
    kept = dict(server.objects)
    (made / "train-00000.arrow").write_bytes(b"another")
    stored.push(store, made)
    assert server.objects == kept


def test_data_without_its_list_was_never_stored_whole(server: S3Server, made: Path, tmp_path: Path) -> None:
    store = Store(server.uri("bucket/tandem"))
    stored.push(store, made)
    del server.objects[f"bucket/tandem/data/{NAME}/files.json"]
    assert not stored.fetch(store, tmp_path / "there" / NAME)
    stored.push(store, made)
    assert stored.fetch(store, tmp_path / "there" / NAME)


@pytest.mark.parametrize("change", ["cut", "swapped", "gone", "list"])
def test_what_is_damaged_is_named_and_nothing_is_left(
    server: S3Server, made: Path, tmp_path: Path, change: str
) -> None:
    store, there = Store(server.uri("bucket/tandem")), tmp_path / "there" / NAME
    stored.push(store, made)
    key = f"bucket/tandem/data/{NAME}/train-00000.arrow"
    if change == "gone":
        del server.objects[key]
    elif change == "list":
        server.objects[f"bucket/tandem/data/{NAME}/files.json"] = json.dumps({"../x": [1, "a"]}).encode()
    else:
        content = server.objects[key]
        server.objects[key] = content[:-1] if change == "cut" else content[:-1] + b"\0"
    with pytest.raises((UserError, FileNotFoundError), match=r"data|train"):
        stored.fetch(store, there)
    assert [path.name for path in there.parent.iterdir()] == [f".{NAME}.lock"]


def test_a_disk_without_room_is_told_before_anything_is_fetched(
    server: S3Server, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, there = Store(server.uri("bucket/tandem")), tmp_path / "there" / NAME
    stored.push(store, made)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"do not fit in .* which has 1e-06 GB free"):
        stored.fetch(store, there)
