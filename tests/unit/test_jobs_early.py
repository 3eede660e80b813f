"""`data.start_early`: the order of rows follows from the data alone, and what fails or ends leaves what it should."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cluster.errors import UserError
from jobs.checkpoint import catalog
from jobs.checkpoint.catalog import Keep, Manifest
from jobs.checkpoint.resume import Point
from jobs.checkpoint.saver import Saver
from jobs.checkpoint.store import Store
from jobs.data import arrivals, batches, prepare, rows
from jobs.data.arrivals import TOGETHER, Arrivals, Arriving, NoMore
from jobs.data.early_order import EarlyOrder
from jobs.data.identity import Noted
from jobs.data.prepare import Prepared
from jobs.data.unfinished import Abandoned
from jobs.driver.early import Early
from jobs.run_folder import RunFolder
from jobs.spec import JobSpec
from jobs.worker import entry, evaluate, loop, prefetch, sequence
from tests.support.slow_preparation import HERE, lay_out
from tests.unit.test_jobs_order import Alone

SEED, FILES = 4, 40


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty files of one range each, of 1 to 7 rows."""
    folder, first = tmp_path_factory.mktemp("data"), 0
    for number in range(FILES):
        count = 1 + number % 7
        numbers = np.arange(first, first + count, dtype=np.int32)
        rows.write(folder / f"train-{number:06d}-00000.arrow", {"number": numbers, "targets": np.ones_like(numbers)})
        first += count
    return folder


def listed(data: Path, seed: int = SEED) -> list[tuple[str, int]]:
    names = arrivals.in_order([path.name for path in data.iterdir()], seed)
    return [(name, len(rows.Rows([data / name]))) for name in names]


def numbers(read: Arriving, start: int, count: int) -> list[int]:
    return read.take(EarlyOrder(read, SEED).take(start, count))["number"].tolist()


def test_the_order_is_the_same_whether_rows_are_there_or_come(data, tmp_path):
    late, files = Arrivals(tmp_path / "late"), listed(data)
    late.add_all(data, [path.name for path in data.iterdir()], SEED)
    whole = Arriving(late.path, data, None)
    count = sum(each for _, each in files)
    first, second = numbers(whole, 0, count), numbers(whole, count, count)
    coming = Arrivals(tmp_path / "coming")
    for file in files[:TOGETHER]:
        coming.add(*file)
    read, seen = Arriving(coming.path, data, None), list[int]()
    for begin in range(0, FILES, TOGETHER):
        group = sum(each for _, each in files[begin : begin + TOGETHER])
        seen += numbers(read, len(seen), group)
        for file in files[begin + TOGETHER : begin + 2 * TOGETHER]:
            coming.add(*file)
        if begin + 2 * TOGETHER >= FILES > begin + TOGETHER:
            coming.end()
    assert seen == first
    assert sorted(first) == sorted(second) == list(range(count))
    assert first != second
    assert numbers(read, count - 3, 9) == (first + second)[count - 3 : count + 6]
    later = batches.Order(count, SEED).take(count, count)
    assert second == whole.take(later)["number"].tolist(), "later passes are those of any run"


def test_rows_are_shuffled_within_sixteen_files_and_files_by_the_seed(data, tmp_path):
    files = listed(data)
    assert sorted(files) != files != listed(data, SEED + 1)
    late = Arrivals(tmp_path / "late")
    late.add_all(data, [path.name for path in data.iterdir()], SEED)
    read = Arriving(late.path, data, None)
    group = [n for file, _ in files[:TOGETHER] for n in rows.Rows([data / file]).take(np.arange(1))["number"]]
    seen = numbers(read, 0, len(read))
    assert set(group) <= set(seen)
    assert seen != sorted(seen)
    assert len(seen) == sum(each for _, each in files[:TOGETHER])


def test_rows_that_do_not_come_end_the_wait(data, tmp_path):
    files, coming = listed(data), Arrivals(tmp_path / "coming")
    for file in files[: TOGETHER + 3]:
        coming.add(*file)
    coming.give_up()
    read = Arriving(coming.path, data, None)
    assert len(numbers(read, 0, len(read))) == len(read)
    with pytest.raises(NoMore):
        EarlyOrder(read, SEED).take(len(read) - 1, 2)


def test_a_column_that_comes_later_is_refused(data, tmp_path):
    rows.write(tmp_path / "train-000099-00000.arrow", {"targets": np.ones(1, np.int32), "new": np.ones(1, np.int32)})
    coming = Arrivals(tmp_path / "coming")
    for file in [*listed(data)[:TOGETHER], ("train-000099-00000.arrow", 1)]:
        coming.add(*file)
    coming.end()
    read = Arriving(coming.path, tmp_path, data)
    with pytest.raises(UserError, match=r"train-000099-00000.arrow\) have new.*without start_early"):
        read.until(len(read) + 1)


# -- the loop ------------------------------------------------------------------------------------------------------


def worker_at(read: Arriving, store: Store) -> SimpleNamespace:
    return SimpleNamespace(
        training=SimpleNamespace(global_batch_size=8, seed=SEED),
        task=SimpleNamespace(collate=lambda taken: torch.from_numpy(taken["number"])),
        rows=read, engine=Alone(), first=True, micro_batch=8, place=sequence.place(0, 1, 1), part=evaluate.whole,
        injector=SimpleNamespace(record_rows=lambda step, mine: None, inject=lambda phase, step: None),
        watchdog=SimpleNamespace(during=lambda what, learns=True: nullcontext()),
        saver=Saver(store, "a", 0, 1, Keep()), skip=frozenset(), start=0, steps=100, until=None, updates=0,
        zero_stage=1, evaluations={}, data="", order=batches.EARLY, short=None, spool=None, learned=None, mixed=(),
    )  # fmt: skip


def test_steps_end_with_a_checkpoint_where_rows_do_not_come(data, tmp_path):
    coming, store = Arrivals(tmp_path / "coming"), Store(str(tmp_path / "checkpoints"))
    for file in listed(data)[:TOGETHER]:
        coming.add(*file)
    coming.give_up()
    worker = worker_at(Arriving(coming.path, data, None), store)
    steps = [step for step, _ in prefetch.prefetch(worker)]
    assert steps == list(range(len(worker.rows) // 8))
    assert loop.end_short(worker, 0)
    loop.finish_checkpoint(worker)
    found, _ = catalog.newest_valid(store)
    assert (found.step, found.order) == (worker.short, batches.EARLY) == (len(steps), 3)
    assert entry.order_of(Point("b", found), early=True) == batches.EARLY


@pytest.mark.parametrize(("version", "early", "known"), [(2, True, "version 3"), (3, False, "versions 1 and 2")])
def test_a_run_of_the_other_kind_does_not_go_on(version, early, known):
    with pytest.raises(UserError, match=f"order of version {version}.*knows {known}"):
        entry.order_of(Point("a", replace(Manifest(7, 7, 1, 1), order=version)), early=early)


# -- the preparation -----------------------------------------------------------------------------------------------


class Told:
    """Who trains meanwhile, for a preparation: what it is told, and what it answers."""

    seed, taken_cpus = SEED, 0.0

    def __init__(self, abandon_after: int = 1 << 30) -> None:
        self.files: list[tuple[str, int]] = []
        self.abandon_after = abandon_after
        self.left: list[Path] = []
        self.first: Prepared | None = None

    def arrived(self, file: str, count: int, digest: str) -> None:
        assert not digest, "all is on a disk"
        self.files.append((file, count))

    def check(self) -> None:
        if len(self.files) >= self.abandon_after:
            raise Abandoned

    def failed(self) -> None:
        assert self.first is not None
        self.left = list(Path(self.first.arriving.before).glob("train-*.arrow"))


@pytest.fixture
def base(tmp_path, monkeypatch):
    lay_out(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "own_slow", raising=False)
    return tmp_path


def spec_of(**data: Any) -> JobSpec:
    return JobSpec.model_validate(
        {
            "name": "x",
            "phase": "pretrain",
            "task": "own_slow:Slow",
            "model": {"architecture": "x"},
            "data": {"train": "x.jsonl", "eval_fraction": 0.1, "start_early": True, **data},
            "training": {"steps": 1, "seed": SEED},
        }
    )


def begun(base: Path, storage: str, told: Told, **data: Any) -> Any:
    how = {"parent": None, "on_progress": lambda *_: None, "sizes": HERE, "overlap": told}
    stages = prepare.stages(spec_of(**data), base, base / storage, **how)
    told.first = next(stages)
    return stages


def test_rows_come_in_order_and_are_those_of_a_preparation_beforehand(base):
    stages = begun(base, "early", told := Told())
    first = told.first
    assert (first.is_whole, first.train_rows, first.rows, told.files) == (False, 0, "", [])
    held_out = prepare.rows_of(first, first.eval_files).take(np.arange(first.eval_rows))["n"].tolist()
    whole = next(stages)
    how = {"parent": None, "on_progress": lambda *_: None, "sizes": HERE}
    before = prepare.prepare(spec_of(start_early=False), base, base / "before", **how)
    assert replace(whole, directory="") == replace(before, directory="")
    assert [file for file, _ in told.files] == arrivals.in_order(whole.train_files, SEED) != whole.train_files
    assert sum(count for _, count in told.files) == whole.train_rows
    assert {path.name for path in Path(whole.directory).iterdir()} == {p.name for p in Path(before.directory).iterdir()}
    moved = prepare.rows_of(first, first.eval_files).take(np.arange(first.eval_rows))["n"].tolist()
    assert moved == held_out, "who knows the folder from before finds the rows in the other one"
    assert not Path(first.arriving.before).exists()
    assert first.task(spec_of()).name == "slow"


def test_what_is_given_up_stays_and_is_gone_on_with(base, capsys):
    with pytest.raises(Abandoned):
        next(begun(base, "left", told := Told(abandon_after=3)))
    assert len(told.left) == 3
    whole = next(begun(base, "left", again := Told()))
    assert again.files[:3] == told.files
    assert "3 files of rows were there" in capsys.readouterr().out
    assert whole.train_rows + whole.eval_rows == 6000


def test_what_fails_by_the_data_is_removed_once_nobody_reads_it(base):
    code, check = (base / "own_slow.py").read_text(), 'assert 777 not in [e["n"] for e in examples]'
    (base / "own_slow.py").write_text(code.replace("time.sleep", f"{check}\n        time.sleep"))
    stages = begun(base, "bad", told := Told(), eval_fraction=0)
    with pytest.raises(UserError, match="bad_rows: skip it would be left out"):
        next(stages)
    assert told.left, "they were there as long as the workers were"
    assert not Path(told.first.arriving.before).exists()


def test_a_run_whose_data_is_noted_otherwise_is_prepared_first(base):
    parts = begun(base, "noted", told := Told())
    noted = {**told.first.parts, "libraries": "others"}
    parts.close()
    how = {"parent": None, "on_progress": lambda *_: None, "sizes": HERE, "overlap": told}
    rows_before = prepare.prepare(spec_of(), base, base / "whole", parent=None, on_progress=lambda *_: None, sizes=HERE)
    (whole,) = prepare.stages(spec_of(), base, base / "noted", **how, before=Noted(noted, rows_before.rows))
    assert whole.is_whole
    assert told.files == []


# -- the driver ----------------------------------------------------------------------------------------------------


def job_of(base: Path, run: str) -> SimpleNamespace:
    (base / run).mkdir()
    return SimpleNamespace(stored=None, spec=spec_of(), folder=RunFolder(base / run), stop=SimpleNamespace(asked=False))


def stages_of(early: Early, base: Path) -> Iterator[Prepared]:
    how = {"parent": None, "on_progress": lambda *_: early.beat(), "sizes": HERE, "overlap": early}
    return prepare.stages(spec_of(), base, base / "storage", **how)


def seen_by(prepared: Prepared) -> tuple[list[list[int]], int]:
    """Return the rows of sixty steps, and how many there are in all."""
    read = prepare.rows_to_train_on(prepared)
    order = EarlyOrder(read, SEED)
    return [read.take(order.take(start, 100))["n"].tolist() for start in range(0, 6000, 100)], read.count


def test_workers_read_what_the_driver_encodes_meanwhile(base):
    early = Early(job_of(base, "first"))
    prepared = early.begin(stages_of(early, base))
    assert not prepared.is_whole
    with early.beside():
        seen, count = seen_by(prepared)
    assert early.whole().train_rows == count
    later = Early(job_of(base, "later"))
    prepared = later.begin(stages_of(later, base))
    assert prepared.is_whole, "it was encoded before"
    with later.beside():
        assert seen_by(prepared) == (seen, count)


@pytest.mark.parametrize("workers_fail", [False, True])
def test_a_preparation_that_fails_stops_the_workers_and_ends_the_job_by_its_own_error(base, workers_fail):
    early = Early(job := job_of(base, "run"))
    whole = stages_of(early, base)

    def failing() -> Iterator[Prepared]:
        yield next(whole)
        early.failed()
        raise UserError("one bad row too many")

    prepared = early.begin(failing())

    def trained() -> None:
        with early.beside():
            with pytest.raises(NoMore):
                prepare.rows_to_train_on(prepared)
            if workers_fail:
                raise RuntimeError("a worker failed")
        early.leave()

    with pytest.raises(UserError, match="one bad row too many"):
        trained()
    assert job.folder.stop_requested()


def test_a_job_that_is_stopped_leaves_its_preparation_to_the_next_one(base):
    early = Early(job := job_of(base, "run"))
    early.begin(stages_of(early, base))
    job.stop.asked = True
    with early.beside():
        pass
    early.leave()
    assert len(list((base / "storage" / "data").glob("*.partial"))) == 1


# -- the spec ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"training": {"epochs": 2}}, "needs `training.steps`"),
        ({"training": {"steps": 2, "micro_batch_size": "auto"}}, "not found by trial with `data.start_early`"),
        ({"task": {"name": "causal-lm", "objective": "dpo"}}, "not offered with objective dpo"),
        ({"phase": "evaluate", "training": None, "model": {"from": "m"}}, "this is phase evaluate"),
    ],
)
def test_what_cannot_be_honoured_is_refused(changed, said):
    values = {
        "name": "x",
        "phase": "pretrain",
        "model": {"architecture": "llama"},
        "data": {"train": "x.jsonl", "start_early": True},
        "training": {"steps": 2},
    }
    with pytest.raises(ValueError, match=said):
        JobSpec.model_validate({**values, **changed})


def test_it_makes_another_run_of_the_same_data():
    assert spec_of().digest() != spec_of(start_early=False).digest()
    plain = {key: value for key, value in spec_of().model_dump(by_alias=True).items() if key != "data"}
    data = {"train": "x.jsonl", "eval_fraction": 0.1}
    assert JobSpec.model_validate({**plain, "data": data}).digest() == spec_of(start_early=False).digest()
