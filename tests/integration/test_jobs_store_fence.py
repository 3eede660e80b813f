"""Attempts that overlap on checkpoints in an object store: one of them writes what counts."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator

import pytest

from jobs.checkpoint import catalog
from jobs.checkpoint.catalog import Keep, Manifest
from jobs.checkpoint.fence import Fence, Superseded
from jobs.checkpoint.store import Store
from tests.support import moto_server
from tests.support.moto_server import MotoServer


@pytest.fixture(scope="module")
def server() -> Iterator[MotoServer]:
    with pytest.MonkeyPatch.context() as monkeypatch, moto_server.running(monkeypatch) as running:
        yield running


@pytest.fixture
def store(server: MotoServer) -> Store:
    """A place of this test's own."""
    return Store(server.uri(f"bucket/{random.randrange(1 << 40):x}"))


def saved(store: Store, step: int, attempt: str, updates: int) -> Manifest:
    """Write an attempt's files of a step."""
    name = f"{attempt}-x.safetensors"
    return Manifest(step, updates, 1, 1, {name: store.write(f"{catalog.folder(step)}/{name}", [attempt.encode()])})


def test_one_that_sleeps_between_looking_and_writing_replaces_nothing(store):
    newer = saved(store, 10, "new", 99)

    class Drowsy(Fence):
        slept = False

        def check(self) -> None:
            super().check()
            if not self.slept:
                type(self).slept = True
                catalog.commit(store, newer, Fence.enter(store, "new"))

    drowsy = Drowsy(store, Fence.enter(store, "old").number, "old")
    with pytest.raises(Superseded, match=r"a newer attempt \(new\)"):
        catalog.commit(store, saved(store, 10, "old", 1), drowsy)
    found = catalog.read(store, 10)
    assert isinstance(found, Manifest)
    assert found.updates == 99
    assert catalog.verify(store, found) is None
    assert catalog.newest_valid(store)[0] == found
    assert catalog.complete(store) == [10]
    catalog.commit(store, saved(store, 10, "newest", 100), Fence.enter(store, "newest"))
    again = catalog.read(store, 10)
    assert isinstance(again, Manifest)
    assert again.updates == 100, "the newest may replace what was there"


def test_of_attempts_that_enter_at_once_one_commits_and_removes(store):
    barrier, ended = threading.Barrier(4), {}

    def attempt(name: str) -> None:
        mine = Store(store.root)
        whole = saved(mine, 10, name, 1)
        barrier.wait()
        fence = Fence.enter(mine, name)
        barrier.wait()
        try:
            catalog.commit(mine, whole, fence)
            catalog.remove_old(mine, Keep(newest=1), fence)
            ended[name] = "saved"
        except Superseded:
            ended[name] = "superseded"

    threads = [threading.Thread(target=attempt, args=(name,)) for name in ("a", "b", "c", "d")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(ended.values()) == ["saved", "superseded", "superseded", "superseded"]
    (winner,) = [name for name, how in ended.items() if how == "saved"]
    found = catalog.read(store, 10)
    assert isinstance(found, Manifest)
    assert list(found.files) == [f"{winner}-x.safetensors"]


def test_manifests_from_before_count_until_there_is_a_newer_one(store):
    catalog.commit(store, saved(store, 20, "first", 5))
    assert store.exists(f"{catalog.folder(20)}/MANIFEST.json")
    found = catalog.read(store, 20)
    assert isinstance(found, Manifest)
    assert found.updates == 5
    assert catalog.read(store, 30) == "no manifest, so it was never completed"
    catalog.commit(store, saved(store, 20, "second", 6), Fence.enter(store, "second"))
    newer = catalog.read(store, 20)
    assert isinstance(newer, Manifest)
    assert newer.updates == 6
