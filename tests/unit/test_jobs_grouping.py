"""Rows that are examples together, ends that are held out of each, and what is measured row by row."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.errors import UserError
from jobs.data import prepare, rows
from jobs.data.examples import BadRows, Example
from jobs.data.grouping import grouped
from jobs.spec import JobSpec
from jobs.tasks import Task, TaskError
from jobs.tasks.grouping import Grouping, moments
from jobs.worker.evaluate import check_rated, interleaved, joined, measure

OWN = '''
import numpy as np
import torch
from jobs.tasks import Task, TaskError
from jobs.tasks.grouping import Grouping


class Sums(Task):
    """Predicts the last number of each key's series from the sum of those before it."""

    name = "sums"
    cuts_each = "the last number of each key"
    gathered = ("ends",)

    def grouping(self):
        return Grouping(("key",), "at")

    def check(self, example):
        if not example["value"]:
            raise TaskError("no value")

    def cut(self, example, at):
        values = example["value"]
        if len(values) < 2:
            return None
        return {**example, "value": values[:-1]}, {**example, "end": True}

    def encode(self, examples):
        series = [[float(v) for v in example["value"]] for example in examples]
        return {
            "key": np.array([ord(example["key"]) for example in examples], dtype=np.int32),
            "total": np.array([sum(s[:-1] if e.get("end") else s) for s, e in zip(series, examples)], dtype=np.float32),
            "end": np.array([s[-1] if e.get("end") else 0 for s, e in zip(series, examples)], dtype=np.float32),
            "targets": np.ones(len(examples), dtype=np.int32),
        }
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sums_of_keys.py").write_text(OWN)
    lines = ["key,at,value", "b,2024-01-03,30", "a,2024-01-10,4", "b,2024-01-01,10", "a,2024-01-09,3", "c,2024-01-01,7"]
    (tmp_path / "series.csv").write_text("\n".join([*lines, "a,2024-01-02,1", "b,2024-01-02,20", ""]))
    return tmp_path


def prepared(folder: Path, **data: Any) -> prepare.Prepared:
    spec = {
        "name": "sums",
        "phase": "pretrain",
        "task": "sums_of_keys:Sums",
        "model": {"architecture": "none"},
        "data": {"train": "series.csv", **data},
        "training": {"steps": 1},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        parsed = JobSpec.model_validate(spec, context={"folder": folder})
        return prepare.prepare(parsed, folder, folder / "s", parent=None, on_progress=lambda *_: None)


def columns(found: prepare.Prepared, split: str) -> dict[str, list[float]]:
    files = rows.Rows([Path(found.directory) / file for file in getattr(found, f"{split}_files")])
    taken = files.take(np.arange(len(files)))
    return {name: taken[name].tolist() for name in ("key", "total", "end")}


def test_rows_of_a_key_are_one_example_in_the_order_of_time_and_its_end_is_held_out(folder: Path) -> None:
    found = prepared(folder)
    keys = [ord(key) for key in "bac"]
    assert columns(found, "train") == {"key": keys, "total": [30, 4, 7], "end": [0, 0, 0]}
    assert columns(found, "eval") == {"key": keys[:2], "total": [30, 4], "end": [30, 4]}
    assert "held out: the last number of each key; 1 of 3 are too short, and are learned whole" in found.notes


def test_nothing_is_held_out_where_that_is_asked_and_no_share_is_drawn(folder: Path) -> None:
    assert columns(prepared(folder, eval_fraction=0), "train")["total"] == [60, 8, 7]
    with pytest.raises(UserError, match=r"eval_fraction 0\.3: this task holds out the last number of each key"):
        prepared(folder, eval_fraction=0.3)


def test_of_data_of_its_own_the_ends_are_measured(folder: Path) -> None:
    (folder / "later.csv").write_text("key,at,value\nd,1,5\nd,2,6\ne,1,1\n")
    found = prepared(folder, eval="later.csv")
    assert columns(found, "train")["total"] == [60, 8, 7]
    assert columns(found, "eval") == {"key": [ord("d")], "total": [5], "end": [6]}
    assert "1 of the held-out examples are too short to be predicted: left out" in found.notes


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("a,soon,1", r"series.csv:9: 'soon' is neither a number nor a date"),
        (",2024-01-01,1", r"series.csv:9: column 'key' holds '?.*, which names no group"),
        ("a,2024-01-01,", "series.csv:9: no value"),
        ("a,5,1", "numbers and dates side by side"),
    ],
)
def test_a_row_that_has_no_place_is_named_by_its_line(folder: Path, line: str, said: str) -> None:
    with (folder / "series.csv").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=said):
        prepared(folder)
    if "side by side" not in said:
        found = prepared(folder, bad_rows="skip")
        assert (found.bad_rows, columns(found, "train")["total"]) == (1, [30, 4, 7])


def test_moments_are_numbers_or_dates() -> None:
    assert moments(["10", "9", 1.5]) == [10, 9, 1.5]
    assert moments(["2024-01-01T00:00:01Z", "2024-01-01"])[0] - moments(["2024-01-01"])[0] == 1
    for wrong in (["x"], [None], [True], ["1", "2024-01-01"], [float("nan")]):
        with pytest.raises(TaskError):
            moments(wrong)


@pytest.mark.parametrize(
    ("at", "said"),
    [
        (
            [1_700_000_000, 1_700_000_001_000, 1_700_000_002],
            r"column 'at' holds 1700000001000 \(log:2\), in milliseconds, beside 1700000000 \(log:1\), in seconds",
        ),
        (
            ["2024-01-01T00:00Z", "2024-01-02T00:00+01:00", "2024-01-03T00:00"],
            r"'2024-01-03T00:00' \(log:3\), without a time zone, beside '2024-01-01T00:00Z' \(log:1\), with a",
        ),
        ([datetime(2024, 1, 1), datetime(2024, 1, 2, tzinfo=timezone.utc)], "log:1.*without a time zone"),
        ([0, 1_700_000_000, 1_700_000_000_000], None),
        ([1.7e9, 1.8e9], None),
        (["2024-01-01", "2024-01-01T05:00"], None),
        (["2024-01-01T00:00Z", "2024-07-01T00:00+02:00"], None),
    ],
)
def test_times_of_two_clocks_have_no_order(at: list[Any], said: str | None) -> None:
    rows_ = [Example({"key": "a", "at": each}, f"log:{line}") for line, each in enumerate(at, 1)]
    found = grouped(rows_, Grouping(("key",), "at"), lambda row: None, BadRows())
    if said is None:
        assert [len(example["at"]) for example in found] == [len(at)]
    else:
        with pytest.raises(UserError, match=said):
            list(found)


@pytest.mark.parametrize(("whole", "answered"), [(True, ["b"]), (False, ["a", "b"])])
def test_a_group_that_is_answered_whole_is_not_answered_without_one_of_its_rows(
    whole: bool, answered: list[str]
) -> None:
    lines = [("a", 1, 5), ("b", 1, 7), ("a", 2, None), ("a", 3, 6), ([], 4, None)]
    rows_ = [Example({"key": key, "at": at, "value": v}, f"log:{n}") for n, (key, at, v) in enumerate(lines, 1)]

    def check(row: Any) -> None:
        if row["value"] is None:
            raise TaskError("no value")

    bad = BadRows(most=9)
    found = list(grouped(rows_, Grouping(("key",), "at", whole=whole), check, bad, whole=True))
    assert [example["key"] for example in found] == answered
    lost = "log:1: it lacks the row log:3, which cannot be used: what comes next would be another step"
    assert [str(row) for row in bad.first] == ["log:3: no value", "log:5: no value", *[lost] * whole]
    kept = list(grouped(rows_, Grouping(("key",), "at", whole=whole), check, BadRows(most=9)))
    assert [example["at"] for example in kept] == [[1, 3], [1]], "what is learned is learned without it"


class Kept(Task):
    """Adds one column up and keeps the other."""

    name = "kept"
    gathered = ("seen",)

    def collate(self, taken: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(column) for name, column in taken.items()}

    def measure(self, model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"loss": batch["x"].sum(), "seen": batch["x"].to(torch.bfloat16)[:, None]}


@pytest.mark.parametrize("world", [1, 2, 3, 4, 9])
def test_what_is_gathered_is_in_the_order_of_the_rows_on_any_number_of_ranks(tmp_path: Path, world: int) -> None:
    rows.write(tmp_path / "x.arrow", {"x": np.arange(7, dtype=np.float32), "targets": np.ones(7, dtype=np.int32)})
    data, model = rows.Rows([tmp_path / "x.arrow"]), torch.nn.Linear(1, 1)
    shares = [
        measure(
            Kept(),
            model,
            data,
            limit=None,
            seed=0,
            micro_batch=2,
            device=torch.device("cpu"),
            rank=rank,
            world_size=world,
        )
        for rank in range(world)
    ]
    whole = joined(shares)
    assert whole["loss"] == 21
    assert whole["seen"].dtype == np.float32
    assert whole["seen"].tolist() == [[float(number)] for number in range(7)]


def test_shares_of_uneven_length_are_put_together() -> None:
    assert interleaved([np.array([0, 3]), np.array([1]), np.array([2])]).tolist() == [0, 1, 2, 3]


def test_the_best_are_not_kept_by_what_is_not_measured() -> None:
    check_rated({"loss": 1.0}, "loss", 1)
    check_rated({"loss": 1.0}, "r2", 0)
    with pytest.raises(UserError, match=r"checkpoint\.metric 'r2' is not measured of this data.* measured: loss, auc"):
        check_rated({"loss": 1.0, "auc": 0.5}, "r2", 1)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (float("nan"), "holds nan, which names no group"),
        (None, "holds None, which names no group"),
        (True, "holds True, which names no group"),
        ("7", "holds '7', a text where rows before have numbers"),
    ],
)
def test_a_row_whose_group_is_none_or_another_by_its_type_alone_is_told(key: object, said: str) -> None:
    rows = [Example({"key": 7, "at": 1}, "x:1"), Example({"key": 7.0, "at": 2}, "x:2"), Example({"key": key}, "x:3")]
    with pytest.raises(UserError, match=rf"x:3: column 'key' {said}"):
        list(grouped(rows, Grouping(("key",)), lambda row: None, BadRows()))


def test_a_column_that_is_not_there_is_told_with_the_option_that_names_it() -> None:
    named = Grouping(("user",), options={"user": "user_column"})
    with pytest.raises(UserError, match=r"name the column in task\.user_column"):
        list(grouped([Example({"usr": 1}, "x:1")], named, lambda row: None, BadRows()))
