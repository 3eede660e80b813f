"""The newest checkpoint that verifies is taken, what was skipped is said, and what need not stay goes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.checkpoint import catalog
from jobs.checkpoint.catalog import Keep, Manifest
from jobs.checkpoint.store import Store

SHARD = "a-00000-of-00001.safetensors"


def make(root: Path, step: int, **metrics: float) -> Path:
    store = Store(str(root))
    folder = catalog.folder(step)
    written = store.write(f"{folder}/{SHARD}", [bytes(range(256)) * 10])
    catalog.commit(store, Manifest(step, step, 1, 1, {SHARD: written}, metrics))
    return root / folder


def truncate(directory: Path) -> None:
    (directory / SHARD).write_bytes((directory / SHARD).read_bytes()[:-1])


def flip_a_bit(directory: Path) -> None:
    content = bytearray((directory / SHARD).read_bytes())
    content[100] ^= 1
    (directory / SHARD).write_bytes(content)


def remove_shard(directory: Path) -> None:
    (directory / SHARD).unlink()


def remove_manifest(directory: Path) -> None:
    (directory / "MANIFEST.json").unlink()


def change_manifest(**changes):
    def apply(directory: Path) -> None:
        path = directory / "MANIFEST.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return apply


def write_manifest(text: str):
    return lambda directory: (directory / "MANIFEST.json").write_text(text)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "has 2559 bytes instead of 2560"),
        (flip_a_bit, "digest differs"),
        (remove_shard, "is missing"),
        (remove_manifest, "never completed"),
        (write_manifest(""), "manifest is unreadable"),
        (write_manifest('{"files": '), "manifest is unreadable"),
        (write_manifest("[]"), "does not hold what it should"),
        (change_manifest(files={}), "does not hold what it should"),
        (change_manifest(step=99), "does not hold what it should"),
        (change_manifest(format=1), "its format is 1"),
        (change_manifest(files={"../../x": {"size": 1, "sha256": "0"}}), "the manifest names '../../x'"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_with_its_reason(tmp_path, damage, reason):
    make(tmp_path, 10)
    damage(make(tmp_path, 20))
    found, skipped = catalog.newest_valid(Store(str(tmp_path)))
    assert found is not None
    assert found.step == 10
    assert len(skipped) == 1
    assert skipped[0].startswith("step-00000020: ")
    assert reason in skipped[0]


def test_the_newest_valid_one_is_taken(tmp_path):
    for step in (10, 20, 30):
        make(tmp_path, step, loss=1.5)
    found, skipped = catalog.newest_valid(Store(str(tmp_path)))
    assert found == replace(found, step=30, metrics={"loss": 1.5})
    assert skipped == []


def test_where_there_is_nothing_nothing_is_found(tmp_path):
    assert catalog.newest_valid(Store(str(tmp_path / "none"))) == (None, [])


@pytest.mark.parametrize(
    ("keep", "gone"),
    [
        (Keep(newest=2), [10, 20, 30]),
        (Keep(newest=1, best=1), [10, 30, 40]),
        (Keep(newest=1, best=2), [30, 40]),
        (Keep(newest=1, best=1, metric="f1", better="max"), [20, 30, 40]),
        (Keep(newest=1, best=1, metric="unknown"), [10, 20, 30, 40]),
        (Keep(newest=9), []),
    ],
)
def test_what_stays_is_the_newest_and_the_best(keep, gone):
    losses = {10: 2.0, 20: 1.0, 30: 3.0, 40: 2.5, 50: 4.0}
    manifests = [Manifest(step, step, 1, 0, metrics={"loss": loss, "f1": 1 / step}) for step, loss in losses.items()]
    assert catalog.expendable(manifests, keep) == gone


@pytest.mark.parametrize("strange", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("better", ["min", "max"])
def test_one_that_was_not_measured_to_a_number_did_not_do_best(strange, better):
    losses = {10: 1.0, 20: strange, 30: 1.0, 40: strange, 50: 2.0}
    manifests = [Manifest(step, step, 1, 0, metrics={"loss": loss}) for step, loss in losses.items()]
    kept = Keep(newest=1, best=2, better=better)
    assert catalog.expendable(manifests, kept) == ([20, 40] if better == "min" else [10, 20, 40])


def test_removing_old_ones_spares_what_is_being_written(tmp_path):
    for step in (10, 20, 30, 40):
        make(tmp_path, step)
    remove_manifest(tmp_path / "step-00000020")  # died while it was written
    remove_manifest(tmp_path / "step-00000040")  # is being written
    catalog.remove_old(Store(str(tmp_path)), Keep(newest=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000030", "step-00000040"]


def test_the_same_through_a_uri(tmp_path):
    make(tmp_path, 10)
    store = Store(f"file://{tmp_path}")
    assert catalog.newest_valid(store)[0].step == 10
    store.remove("step-00000010")
    assert catalog.steps(store) == []


def test_the_order_of_the_rows_is_noted_and_is_the_first_one_where_it_is_not(tmp_path):
    make(tmp_path, 10)
    store, path = Store(str(tmp_path)), tmp_path / catalog.folder(10) / "MANIFEST.json"
    assert json.loads(path.read_text())["order"] == 1
    written = json.loads(path.read_text())
    path.write_text(json.dumps({**written, "order": 2}))
    assert catalog.read(store, 10).order == 2
    path.write_text(json.dumps({key: value for key, value in written.items() if key != "order"}))
    assert catalog.read(store, 10).order == 1
