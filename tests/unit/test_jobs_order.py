"""A run goes on in the order of rows that it began with, and notes it in each of its checkpoints."""

from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cluster.errors import UserError
from jobs.checkpoint import catalog, resume
from jobs.checkpoint.catalog import Keep, Manifest
from jobs.checkpoint.saver import Saver
from jobs.checkpoint.shards import KINDS, Fragment
from jobs.checkpoint.store import Store
from jobs.data import batches, mixture, rows
from jobs.data.mixture import Part
from jobs.worker import entry, evaluate, learned, loop, sequence

COUNT, STEPS, SEED = batches.LISTED_ROWS + 3, 6, 4


class Alone:
    """The engine of a group of one, with a parameter of its own."""

    rank, world_size, in_files, device = 0, 1, False, torch.device("cpu")
    model = SimpleNamespace(module=torch.nn.Linear(10, 1))

    def all_sum(self, *values: float) -> list[float]:
        return list(values)

    def elements(self) -> dict[str, int]:
        return {"w": 10}

    def owned_fragments(self) -> list[Fragment]:
        return [Fragment("w", 0, {kind: torch.ones(10) for kind in KINDS})]


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> rows.Rows:
    path = tmp_path_factory.mktemp("rows") / "0.arrow"
    rows.write(path, {"targets": np.ones(COUNT, np.int32), "number": np.arange(COUNT, dtype=np.int32)})
    return rows.Rows([path])


def worker_at(point: resume.Point, read: rows.Rows, store: Store, mixed: tuple[Part, ...] = ()) -> SimpleNamespace:
    """Return what the loop reads of a worker that goes on from `point`."""
    said: list[str] = []
    return SimpleNamespace(
        said=said,
        folder=SimpleNamespace(add_remarks=said.extend),
        training=SimpleNamespace(global_batch_size=32, seed=SEED),
        task=SimpleNamespace(collate=lambda taken: torch.from_numpy(taken["number"])),
        rows=read,
        engine=Alone(),
        first=True,
        micro_batch=32,
        place=sequence.place(0, 1, 1),
        part=evaluate.whole,
        injector=SimpleNamespace(record_rows=lambda step, mine: None, inject=lambda phase, step: None),
        watchdog=SimpleNamespace(during=lambda what, learns=True: nullcontext()),
        saver=Saver(store, point.attempt, 0, 1, Keep()),
        skip=frozenset(),
        start=point.step,
        steps=STEPS,
        until=None,
        updates=point.step,
        zero_stage=1,
        evaluations={},
        data="d",
        order=entry.order_of(point, mixed=bool(mixed)),
        mixed=mixed,
        learned=learned.begin(mixed, point.manifest.learned if point.manifest else {}),
    )


def seen_by(worker: SimpleNamespace, steps: int) -> np.ndarray:
    """Return the numbers of the rows of the next steps."""
    return np.concatenate([micro[0] for _, (micro, _, _) in islice(loop.prefetch(worker), steps)])


def resumed(store: Store) -> resume.Point:
    found, skipped = catalog.newest_valid(store)
    assert skipped == []
    return resume.Point("b", found)


@pytest.mark.parametrize("version", [1, 2])
def test_a_run_goes_on_in_the_order_that_it_began_with(tmp_path: Path, read: rows.Rows, version: int) -> None:
    store, whole = Store(str(tmp_path)), batches.Order(COUNT, SEED, version).take(0, 32 * STEPS)
    worker = worker_at(resume.Point("a"), read, store)
    assert worker.order == batches.VERSION == 2, "a run that begins now has the newest"
    worker.order = version
    begun = seen_by(worker, 2)
    for step in (2, 4):  # each checkpoint of a run that goes on says it again
        loop.begin_checkpoint(worker, step)
        loop.finish_checkpoint(worker)
        worker = worker_at(resumed(store), read, store)
        assert (worker.start, worker.order) == (step, version)
    assert np.array_equal(np.concatenate([begun, whole[64:128], seen_by(worker, 2)]), whole)


def test_a_checkpoint_that_notes_no_order_is_of_the_first_one(tmp_path: Path, read: rows.Rows) -> None:
    store = Store(str(tmp_path))
    loop.begin_checkpoint(worker := worker_at(resume.Point("a"), read, store), 2)
    loop.finish_checkpoint(worker)
    path = tmp_path / catalog.folder(2) / catalog.MANIFEST
    path.write_text(path.read_text().replace(', "order": 2', ""))
    assert "order" not in path.read_text()
    assert np.array_equal(
        seen_by(worker_at(resumed(store), read, store), 4), batches.Order(COUNT, SEED, 1).take(64, 128)
    )


MIXED = (Part("a", 40, 0.75), Part("b", COUNT - 40, 0.25))


def test_a_mixture_goes_on_where_it_was_and_knows_what_it_has_learned_from(tmp_path: Path, read: rows.Rows) -> None:
    store, order = Store(str(tmp_path)), mixture.Mixed(MIXED, SEED)
    whole, seen = order.take(0, 32 * STEPS), list[np.ndarray]()
    point = resume.Point("a")
    for step in (2, 4, STEPS):
        worker = worker_at(point, read, store, MIXED)
        assert worker.order == mixture.VERSION
        for done, (micro, targets, _) in islice(loop.prefetch(worker), step - worker.start):
            assert targets == 32
            seen.append(np.array(micro[0]))
            shares = loop.count_sources(worker, done + 1)
        loop.begin_checkpoint(worker, step)
        loop.finish_checkpoint(worker)
        point = resumed(store)
        assert point.manifest is not None
        counted = [point.manifest.learned[name] for name in ("a", "b")]
        assert counted == [[rows, rows] for rows in order.counts(32 * step)]
    assert np.array_equal(np.concatenate(seen), whole)
    wanted = {"a": 0.75, "b": 0.25}
    assert shares == {f"share_of_{what}/{name}": wanted[name] for what in ("rows", "targets") for name in "ab"}
    assert "a 75 % (75 %), 3.6 passes; b 25 % (25 %)" in worker.said[0]


def test_what_is_left_out_counts_for_no_source(tmp_path: Path, read: rows.Rows) -> None:
    worker = worker_at(resume.Point("a"), read, Store(str(tmp_path)), MIXED)
    worker.skip = frozenset({1, 2})
    for done, _ in loop.prefetch(worker):
        loop.count_sources(worker, done + 1)
    assert int(worker.learned.rows.sum()) == 32 * (STEPS - 2)


def test_a_mixture_does_not_go_on_in_an_order_over_one_source() -> None:
    for version, mixed in ((2, True), (mixture.VERSION, False)):
        with pytest.raises(UserError, match="an order of version"):
            entry.order_of(resume.Point("a", replace(Manifest(7, 7, 1, 1), order=version)), mixed)


@pytest.mark.parametrize("version", [0, 3])
def test_an_order_that_is_not_known_is_refused(version: int) -> None:
    point = resume.Point("a", replace(Manifest(7, 7, 1, 1), order=version))
    with pytest.raises(
        UserError, match=rf"step 7 visits its rows in an order of version {version}.*knows versions 1 and 2"
    ):
        entry.order_of(point)
