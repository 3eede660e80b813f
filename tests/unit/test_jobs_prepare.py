"""Encoding happens once, and gives the same rows wherever it runs."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluster.errors import UserError
from jobs.data import prepare, rows
from jobs.spec import JobSpec


def spec_for(**data) -> JobSpec:
    return JobSpec.model_validate(
        {
            "name": "x",
            "phase": "pretrain",
            "model": {"architecture": "llama"},
            "data": {
                "tokenizer": {"train": "bpe", "vocab_size": 300},
                "sequence_length": 16,
                "eval_fraction": 0.2,
                **data,
            },
            "training": {"steps": 1},
        }
    )


def run(spec: JobSpec, base: Path, storage: Path) -> tuple[prepare.Prepared, list[tuple[str, int, int]]]:
    seen: list[tuple[str, int, int]] = []
    done = prepare.prepare(spec, base, storage, parent=None, on_progress=lambda *event: seen.append(event))
    return done, seen


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for index in range(30):
        (folder / f"{index:02d}.txt").write_text(f"document {index} says hello " * 20)
    return folder


def test_second_time_is_read_from_the_cache(corpus, tmp_path):
    spec = spec_for(train="*.txt")
    first, events = run(spec, corpus, tmp_path / "s")
    second, no_events = run(spec, corpus, tmp_path / "s")
    assert (first.cached, second.cached) == (False, True)
    assert {"read", "fit", "encode"} == {phase for phase, _, _ in events}
    assert no_events == []
    assert (first.train_rows, first.eval_rows) == (second.train_rows, second.eval_rows)
    assert first.eval_rows > 0


@pytest.mark.parametrize("change", [{"sequence_length": 8}, {"split_seed": 1}, {"eval_fraction": 0.3}])
def test_another_setting_is_another_data_set(corpus, tmp_path, change):
    first, _ = run(spec_for(train="*.txt"), corpus, tmp_path / "s")
    other, _ = run(spec_for(**{"train": "*.txt", **change}), corpus, tmp_path / "s")
    assert first.digest != other.digest


def test_changed_content_is_another_data_set(corpus, tmp_path):
    first, _ = run(spec_for(train="*.txt"), corpus, tmp_path / "s")
    (corpus / "00.txt").write_text("something else")
    assert run(spec_for(train="*.txt"), corpus, tmp_path / "s")[0].digest != first.digest


def test_failure_leaves_nothing_behind(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"body": "no text here"}\n' * 30)
    with pytest.raises(UserError, match=r"x\.jsonl:1: no text in column 'text'; this example has \['body'\]"):
        run(spec_for(train="x.jsonl"), tmp_path, tmp_path / "s")
    assert list((tmp_path / "s" / "data").iterdir()) == []


def test_empty_data_is_refused_before_any_worker_starts(tmp_path):
    (tmp_path / "x.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no example"):
        run(spec_for(train="x.jsonl"), tmp_path, tmp_path / "s")


GOOD = [json.dumps({"text": f"document {i} says hello " * 5}) for i in range(30)]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"text": "no end', "not valid JSON"),
        (b'{"text": "\xff"}', "byte 0xff is not UTF-8"),
        (b'{"Text": "wrong column"}', r"no text in column 'text'; this example has \['Text'\]; did you mean 'Text'"),
        (b'{"text": null}', "column 'text' holds NoneType, not text"),
        (b'{"messages": [{"role": "user", "content": "?"}]}', "has no answer to learn from"),
        (b'{"messages": 3}', "messages"),
    ],
)
def test_a_bad_row_ends_the_job_or_is_counted(tmp_path, line, said):
    lines = [text.encode() for text in GOOD]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join([*lines[:16], line, *lines[16:]]))
    with pytest.raises(UserError, match=rf"x\.jsonl:17: .*{said}"):
        run(spec_for(train="x.jsonl"), tmp_path, tmp_path / "s")
    done, _ = run(spec_for(train="x.jsonl", bad_rows="skip"), tmp_path, tmp_path / "s")
    assert done.bad_rows == 1
    assert "x.jsonl:17: " in done.first_bad[0]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    clean, _ = run(spec_for(train="x.jsonl"), tmp_path, tmp_path / "s")
    assert (done.train_rows, done.eval_rows) == (clean.train_rows, clean.eval_rows)
    assert run(spec_for(train="x.jsonl"), tmp_path, tmp_path / "s")[0].cached


def test_too_many_bad_rows_end_the_job_all_the_same(tmp_path):
    (tmp_path / "x.jsonl").write_text("\n".join([*GOOD, "{", "{", "{"]))
    with pytest.raises(UserError, match=r"x\.jsonl:33: .* bad row number 3, and data.max_bad_rows is 2"):
        run(spec_for(train="x.jsonl", bad_rows="skip", max_bad_rows=2), tmp_path, tmp_path / "s")


def test_a_label_that_training_never_saw_is_named_with_its_file(tmp_path):
    for name in ("train/cat/1", "train/dog/1", "eval/cat/1", "eval/bird/1"):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(path)
    spec = spec_for(train="train", eval="eval").model_copy(update={"task": "image-classification"})
    with pytest.raises(UserError, match=r"eval/bird/1\.png: labels \['bird'\] are not among the 2 labels"):
        run(spec, tmp_path, tmp_path / "s")
    skipping = spec.model_copy(update={"data": spec.data.model_copy(update={"bad_rows": "skip"})})
    done, _ = run(skipping, tmp_path, tmp_path / "s")
    assert (done.eval_rows, done.bad_rows) == (1, 1)


def test_rows_of_several_files_read_as_one(tmp_path):
    whole = {"input_ids": np.arange(60, dtype=np.int32).reshape(20, 3), "targets": np.arange(20, dtype=np.int32)}
    parts = [{key: column[a:b] for key, column in whole.items()} for a, b in ((0, 7), (7, 8), (8, 20))]
    files = [tmp_path / f"{index}.arrow" for index in range(3)]
    for path, part in zip(files, parts, strict=True):
        rows.write(path, part)
    read = rows.Rows(files)
    wanted = np.array([19, 0, 7, 7, 8, 6])
    assert len(read) == 20
    assert np.array_equal(read.take(wanted)["input_ids"], whole["input_ids"][wanted])
    assert np.array_equal(read.targets, whole["targets"])
