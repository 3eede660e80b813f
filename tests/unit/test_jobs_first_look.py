"""`validate` refuses what a job's preparation refuses before it does anything, in the same words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.errors import UserError
from jobs import cli, first_look
from jobs.data import origins, prepare, sources
from jobs.driver import storage
from jobs.driver.storage import NotWritable
from jobs.spec import JobSpec


def spec(data: dict[str, Any], **task: Any) -> JobSpec:
    values = {"name": "x", "phase": "pretrain", "task": {"name": "causal-lm", "sequence_length": 16, **task}}
    values |= {"model": {"architecture": "llama"}, "data": data, "training": {"steps": 1}}
    return JobSpec.model_validate(values)


def two(one: Any, other: Any) -> dict[str, Any]:
    return {"mixture": [{"name": "a", "train": one, "weight": 1}, {"name": "b", "train": other, "weight": 1}]}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "x.jsonl").write_text('{"text": "a text"}\n{"text": "another"}\n')
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    (tmp_path / "no.tar").write_text("no archive")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "link.jsonl").symlink_to("x.jsonl")
    return tmp_path


CASES: list[tuple[dict[str, Any], str]] = [
    ({"train": ["x.jsonl", "no.tar"]}, r"no\.tar: cannot be read: .*with data\.bad_rows: skip it would be left out"),
    ({"train": "x.jsonl", "eval": "no.tar"}, r"no\.tar: cannot be read"),
    ({"train": "table.csv"}, r"table\.csv:2: no text in column 'text'"),
    ({"train": "empty.jsonl"}, r"empty\.jsonl holds no example"),
    (two("x.jsonl", "empty.jsonl"), r"source 'b' has no row to train on"),
    (two("x.jsonl", ["link.jsonl"]), r"the sources 'a' and 'b' both hold .*x\.jsonl: its rows"),
    (two("x.jsonl", "*.jsonl"), r"the sources 'a' and 'b' both hold .*x\.jsonl: its rows"),
    (two("hf://o/n", ["x.jsonl", "hf://o/n:train"]), r"'a' and 'b' both hold hf://o/n:train"),
    (two("hf://o/n:test", "hf://datasets/o/n@main/a.parquet"), r"'a' \(hf://o/n:test\) and 'b' .* name its files in"),
    (two("s3://me:secret@b/x", "s3://me:secret@b/x"), r"both hold s3://b/x: its"),
    ({"train": "x.jsonl", "columns": ["text"]}, r"data\.columns is for CSV and TSV files, and there is none"),
]


@pytest.mark.parametrize(("data", "said"), CASES, ids=str)
def test_validate_refuses_what_preparation_refuses_in_its_words(base: Path, data: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as early:
        first_look.look_at_data(spec(data), base)
    with pytest.raises(UserError) as late:
        prepare.prepare(spec(data), base, base / "storage", parent=None, on_progress=lambda *_: None)
    assert str(early.value) == str(late.value)


@pytest.mark.parametrize(
    "data",
    [
        {"train": ["x.jsonl", "no.tar"], "bad_rows": "skip"},
        {"train": ["x.jsonl", "no.tar"], "max_examples": 2},  # which are read before the archive is
        two("x.jsonl", "hf://datasets/o/n/a.parquet"),
        two("hf://datasets/o/n/a.parquet", "hf://datasets/o/n/b.parquet"),
        two("hf://o/n:train", "hf://o/n:test"),
        {"train": "table.csv", "columns": ["text", "other"]},
        {"train": ["x.jsonl", "s3://bucket/folder"], "columns": ["text", "other"]},  # which may hold tables
    ],
    ids=str,
)
def test_validate_lets_pass_what_a_job_can_do(base: Path, data: dict[str, Any]) -> None:
    first_look.look_at_data(spec(data), base)


def test_origins_are_those_of_the_opened_sources(base: Path, images: Path) -> None:
    for folder, names in {"said": ("one.wav", "two.wav"), "told": ("one.wav", "metadata.csv")}.items():
        (base / folder).mkdir()
        for name in names:
            content = b"a recording" if name.endswith("wav") else b"file_name,text\none.wav,one\n"
            (base / folder / name).write_bytes(content)
    archives = ["no.tar", "x.jsonl"]
    for where in ("x.jsonl", "*.jsonl", "{x,empty}.jsonl", "said", "told", str(images), ".", archives, "python-stdlib"):
        opened = sources.open_source(where, base)
        assert set(origins.of(where, base)) == {single.origin for single in opened.singles}, where
        assert any(map(origins.is_table, origins.of(where, base))) == opened.tables, where


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name in ("images/cat/1.png", "images/dog/2.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"an image")
    return tmp_path / "images"


def test_validate_refuses_places_that_nothing_opens_in_the_words_of_the_job(base: Path) -> None:
    values = spec(two("x.jsonl", "x.jsonl")).resolved() | {"storage": "x.jsonl/below"}
    values["model"] = {"from": "./absent", "export": "foo://bucket/models"}
    values["phase"] = "finetune"
    (base / "spec.yaml").write_text(json.dumps(values))
    done = CliRunner().invoke(cli.app, ["validate", str(base / "spec.yaml")])
    assert isinstance(done.exception, UserError)
    for key, places in (("storage", {}), ("model.export", {"storage": "storage"})):
        with pytest.raises(NotWritable, match=f"^{key}: ") as refused:
            storage.check(JobSpec.model_validate(values | places), base)
        assert str(refused.value) in str(done.exception).splitlines()
    assert "both hold" in str(done.exception)
