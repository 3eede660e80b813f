"""Encoding happens once, and gives the same rows wherever it runs."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image
from pydantic import ValidationError

from cluster import specfile
from cluster.errors import UserError
from jobs.data import prepare, rows
from jobs.data.examples import kind_of
from jobs.spec import JobSpec
from jobs.tasks import TaskSetupError

TEXT = {"name": "causal-lm", "tokenizer": {"train": "bpe", "vocab_size": 300}, "sequence_length": 16}


def spec_for(task: str | dict = TEXT, **data) -> JobSpec:
    return JobSpec.model_validate(
        {
            "name": "x",
            "phase": "pretrain",
            "task": task,
            "model": {"architecture": "llama"},
            "data": data if "eval" in data else {"eval_fraction": 0.2, **data},
            "training": {"steps": 1},
        }
    )


def job(phase: str, parent: Path, task: dict | None = None, **data) -> JobSpec:
    """A job that starts from a model."""
    training = {"training": {"steps": 1}} if phase == "finetune" else {}
    values = {"name": "x", "phase": phase, "model": {"from": str(parent)}, **training}
    task = task or {"name": "causal-lm", "sequence_length": 64}
    return JobSpec.model_validate({**values, "task": task, "data": data})


def run(
    spec: JobSpec, base: Path, storage: Path, parent: Path | None = None
) -> tuple[prepare.Prepared, list[tuple[str, int, int]]]:
    seen: list[tuple[str, int, int]] = []
    done = prepare.prepare(spec, base, storage, parent=parent, on_progress=lambda *event: seen.append(event))
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
    assert list(dict.fromkeys(phase for phase, *_ in events)) == ["read", "fit", "encode"]
    ends = {phase: (done, total, counts) for phase, done, total, counts in events}
    size = sum(path.stat().st_size for path in corpus.iterdir())
    assert ends["read"] == ends["encode"] == (1, 1, {"rows": 30, "bytes": size})
    assert len(events) < 20, "not a line for each example"
    assert no_events == []
    assert (first.train_rows, first.eval_rows) == (second.train_rows, second.eval_rows)
    assert first.eval_rows > 0


@pytest.mark.parametrize(
    "change", [{"task": {**TEXT, "sequence_length": 8}}, {"split_seed": 1}, {"eval_fraction": 0.3}]
)
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
        (b'{"instruction": "q", "context": "", "response": "a"}', r"rename 'instruction' and 'response'"),
        (b'{"question": "q", "answer": "a"}', r"`prompt` and `completion`, .*: rename 'question' and 'answer'"),
        (b'{"Text": "wrong column"}', r"no text in column 'text'; this example has \['Text'\]; did you mean 'Text'"),
        (b'{"text": null}', "column 'text' holds null, not text"),
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


def test_rows_that_are_bad_for_other_reasons_are_counted_by_kind(tmp_path):
    bad = [{"text": 7}, *({"texts": f"{i}"} for i in range(25)), {"text": 8}, {"text": ""}]
    (tmp_path / "x.jsonl").write_text("\n".join([*GOOD, *map(json.dumps, bad)]))
    done, _ = run(spec_for(train="x.jsonl", bad_rows="skip"), tmp_path, tmp_path / "s")
    assert (done.bad_rows, "x.jsonl:31: " in done.first_bad[0]) == (28, True)
    assert [reason.split(str(tmp_path))[0] for reason in done.bad_reasons] == [
        "25 of them for another reason, as ",
        "1 of them for another reason, as ",
    ]
    assert "x.jsonl:32: no text in column 'text'" in done.bad_reasons[0]
    assert "x.jsonl:58: " in done.bad_reasons[1]
    assert list(run(spec_for(train="x.jsonl", bad_rows="skip"), tmp_path, tmp_path / "s")[0].bad_reasons) == list(
        done.bad_reasons
    )


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("'content' holds int (5), not text", "'content' holds int (17), not text", True),
        ("column 'a' holds '', not a text", "column 'b' holds '', not a text", False),
        ("column 'a' holds 'x', which is no label", "column 'a' holds 'it', which is no label", True),
        ("the chat template leaves out 'tools'", "the chat template leaves out 'name'", False),
        ("not valid JSON", "the text is empty", False),
    ],
)
def test_a_kind_of_bad_row_leaves_out_what_is_the_rows_own(one, other, same):
    assert (kind_of(one) == kind_of(other)) is same


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "half an emoji \ud83d in a page"}, r"holds half of a surrogate pair, '\ud83d'"),
        ({"text": ""}, "the text is empty"),
        ({"text": " \n"}, "the text is empty"),
        ({"text": float("nan")}, "holds float (nan), not text"),
        ({"text": 7}, "holds int (7), not text"),
        ({"text": ["a"]}, "holds list (['a']), not text"),
        ({"instruction": "a", "output": ""}, "an answer is empty"),
        ({"instruction": "a", "input": float("nan"), "output": "b"}, "float"),
    ],
)
def test_a_row_that_is_no_text_is_a_bad_row(tmp_path, row, said):
    (tmp_path / "x.jsonl").write_text("\n".join([*GOOD, json.dumps(row)]))
    done, _ = run(spec_for(train="x.jsonl", bad_rows="skip"), tmp_path, tmp_path / "s")
    assert done.bad_rows == 1
    assert "x.jsonl:31: " in done.first_bad[0]
    assert said in done.first_bad[0]
    (tmp_path / "x.jsonl").write_text("\n".join(GOOD))
    clean, _ = run(spec_for(train="x.jsonl"), tmp_path, tmp_path / "s")
    assert (done.train_rows, done.eval_rows, done.rows) == (clean.train_rows, clean.eval_rows, clean.rows)


LABELLED = [{"text": f"a text {n}", "label": n % 2} for n in range(20)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"label": float("nan")}, "holds nan, which is no label"),
        ({"label": 0.5}, "holds 0.5, which is no label: a label is a text or a whole number"),
        ({"label": None}, "holds None, which is no label"),
        ({"label": [1]}, "which is no label"),
        ({"label": " "}, "which is no label"),
        ({"text": ""}, "not a text"),
        ({"text": 3}, "not a text"),
        ({"text": "\udc80"}, "lone surrogate"),
    ],
)
def test_a_labelled_text_that_is_none_is_a_bad_row(tmp_path, change, said):
    lines = [json.dumps(row) for row in (*LABELLED, {**LABELLED[0], **change})]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    task = {"name": "text-classification", "tokenizer": {"train": "word"}}
    done, _ = run(spec_for(task, train="x.jsonl", bad_rows="skip"), tmp_path, tmp_path / "s")
    assert done.bad_rows == 1
    assert "x.jsonl:21: " in done.first_bad[0]
    assert said in done.first_bad[0]
    assert "2 labels: 0, 1" in done.notes


def test_whole_numbers_are_labels_however_a_table_holds_them(tmp_path):
    labels = pa.array([None if n == 3 else float(n % 2) for n in range(20)])
    table = pa.table({"text": [f"a text {n}" for n in range(20)], "label": labels})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    task = {"name": "text-classification", "tokenizer": {"train": "word"}}
    done, _ = run(spec_for(task, train="x.parquet", bad_rows="skip"), tmp_path, tmp_path / "s")
    assert "2 labels: 0, 1" in done.notes
    assert done.first_bad[0].endswith("row 4: column 'label' holds None, which is no label")


def test_names_of_columns_that_nothing_has_are_refused(tmp_path):
    (tmp_path / "x.jsonl").write_text("\n".join(GOOD))
    with pytest.raises(UserError, match=r"data\.columns is for .* and there is none"):
        run(spec_for(train="x.jsonl", columns=["text"]), tmp_path, tmp_path / "s")
    with pytest.raises(UserError, match=r"data\.quotes is for .* and there is none"):
        run(spec_for(train="x.jsonl", quotes=False), tmp_path, tmp_path / "s")
    (tmp_path / "x.csv").write_text("text\n" + "".join(f"row {n}\n" for n in range(30)))
    with pytest.raises(UserError, match=r"x\.csv:1: the line is a header"):
        run(spec_for(train="x.csv", columns=["text"]), tmp_path, tmp_path / "s")


def test_copies_between_train_and_eval_are_counted(tmp_path):
    (tmp_path / "x.jsonl").write_text("\n".join(GOOD))
    (tmp_path / "y.jsonl").write_text("\n".join([*GOOD[:3], '{"text": "only here"}']))
    done, _ = run(spec_for(train="x.jsonl", eval="y.jsonl"), tmp_path, tmp_path / "s")
    assert "3 of 4 held-out examples are also in the training data" in done.notes


def test_what_is_left_out_of_a_folder_is_said_also_when_the_rows_are_there_already(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x.jsonl").write_text("\n".join(GOOD))
    assert not any("left out" in note for note in run(spec_for(train="data"), tmp_path, tmp_path / "s")[0].notes)
    (tmp_path / "data" / "notes.docx").write_text("x")
    again, _ = run(spec_for(train="data"), tmp_path, tmp_path / "s")
    assert again.cached
    assert "data: 1 entry left out (of an unknown kind): notes.docx" in again.notes


def test_data_of_which_nothing_can_be_predicted_is_refused(tmp_path):
    turns = [{"role": "user", "content": "word " * 200}, {"role": "assistant", "content": "yes"}]
    lines = [
        json.dumps({"messages": [{**turns[0], "content": f"{n} {turns[0]['content']}"}, turns[1]]}) for n in range(9)
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    with pytest.raises(
        UserError, match=r"none of its 9 examples .*: all are longer than sequence_length \(16 tokens\)"
    ):
        run(spec_for(train="x.jsonl", eval_fraction=0), tmp_path, tmp_path / "s")
    (tmp_path / "y.jsonl").write_text("\n".join(GOOD))
    with pytest.raises(UserError, match=r"x\.jsonl: none of its 9 examples"):
        run(spec_for(train="y.jsonl", eval="x.jsonl"), tmp_path, tmp_path / "s")


FRAGILE = """
import numpy as np
from jobs.tasks import Task, TaskSetupError

class Fragile(Task):
    name = "fragile"

    def encode(self, examples):
        if any("setup" in example for example in examples):
            raise TaskSetupError("no chat template")
        return {"targets": np.array([10 // example["n"] for example in examples], np.int32)}
"""


@pytest.fixture
def fragile(tmp_path, monkeypatch):
    (tmp_path / "own_fragile.py").write_text(FRAGILE)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "own_fragile", raising=False)
    return "own_fragile:Fragile"


def test_a_fault_of_ones_own_code_on_a_row_is_a_bad_row_with_its_traceback(tmp_path, fragile, capsys):
    (tmp_path / "x.jsonl").write_text("".join(f'{{"n": {n}}}\n' for n in (1, 2, 0, 5, 0)))
    done, _ = run(spec_for(fragile, train="x.jsonl", eval_fraction=0, bad_rows="skip"), tmp_path, tmp_path / "s")
    assert (done.train_rows, done.bad_rows) == (3, 2)
    assert done.first_bad[0].endswith("x.jsonl:3: ZeroDivisionError: integer division or modulo by zero")
    shown = capsys.readouterr().out
    assert (shown.count("Traceback"), '10 // example["n"]' in shown) == (1, True)
    with pytest.raises(UserError, match=r"x\.jsonl:3: ZeroDivisionError"):
        run(spec_for(fragile, train="x.jsonl", eval_fraction=0), tmp_path, tmp_path / "s")


def test_a_fault_of_the_task_as_a_whole_is_said_once(tmp_path, fragile):
    (tmp_path / "x.jsonl").write_text('{"n": 1, "setup": 0}\n{"n": 0}\n')
    with pytest.raises(TaskSetupError, match=r"^no chat template$"):
        run(spec_for(fragile, train="x.jsonl", eval_fraction=0, bad_rows="skip"), tmp_path, tmp_path / "s")


def test_a_chunk_in_which_no_row_is_good_does_not_end_what_others_hold(tmp_path, fragile, monkeypatch):
    (tmp_path / "x.jsonl").write_text("".join(f'{{"n": {n}, "pad": "{"x" * 3_000_000}"}}\n' for n in (1, 2, 0, 0, 5)))
    done, _ = run(spec_for(fragile, train="x.jsonl", eval_fraction=0, bad_rows="skip"), tmp_path, tmp_path / "s")
    assert (done.train_rows, done.bad_rows, len(done.train_files)) == (3, 2, 2)
    (tmp_path / "x.jsonl").write_text('{"n": 0}\n{"n": 0}\n')
    with pytest.raises(UserError, match=r"none of its 2 examples can be used; .*ZeroDivisionError"):
        run(spec_for(fragile, train="x.jsonl", eval_fraction=0, bad_rows="skip"), tmp_path, tmp_path / "s")


def test_too_many_bad_rows_end_the_job_all_the_same(tmp_path):
    (tmp_path / "x.jsonl").write_text("\n".join([*GOOD, "{", "{", "{"]))
    with pytest.raises(UserError, match=r"x\.jsonl:33: .* bad row number 3, and data.max_bad_rows is 2"):
        run(spec_for(train="x.jsonl", bad_rows="skip", max_bad_rows=2), tmp_path, tmp_path / "s")


def test_a_label_that_training_never_saw_is_named_with_its_file(tmp_path):
    for name in ("train/cat/1", "train/dog/1", "eval/cat/1", "eval/bird/1"):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(path)
    spec = spec_for("image-classification", train="train", eval="eval")
    with pytest.raises(UserError, match=r"eval/bird/1\.png: labels \['bird'\] are not among the 2 labels"):
        run(spec, tmp_path, tmp_path / "s")
    skipping = spec.model_copy(update={"data": spec.data.model_copy(update={"bad_rows": "skip"})})
    done, _ = run(skipping, tmp_path, tmp_path / "s")
    assert (done.eval_rows, done.bad_rows) == (1, 1)


def test_an_image_that_cannot_be_read_is_a_bad_row_with_its_file(tmp_path):
    for number in range(8):
        path = tmp_path / "data" / f"{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4), number, np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:20])
    spec = spec_for("image-classification", train="data", eval_fraction=0)
    with pytest.raises(UserError, match=r"1/7\.png: cannot read an image"):
        run(spec, tmp_path, tmp_path / "s")
    skipping = spec_for("image-classification", train="data", eval_fraction=0, bad_rows="skip")
    done, _ = run(skipping, tmp_path, tmp_path / "s")
    assert (done.train_rows, done.bad_rows) == (7, 1)


def test_a_model_without_a_tokenizer_is_measured_with_the_one_that_is_named(corpus, tmp_path):
    made, _ = run(spec_for(train="*.txt"), corpus, tmp_path / "s")
    (tmp_path / "bare").mkdir()
    task = {"name": "causal-lm", "sequence_length": 64, "tokenizer": {"from": str(made.task_directory)}}
    measured, _ = run(job("evaluate", tmp_path / "bare", task, eval="*.txt"), corpus, tmp_path / "s", tmp_path / "bare")
    assert measured.eval_rows > 0


def test_measuring_first_leaves_nothing_that_training_would_take_for_its_rows(corpus, tmp_path):
    made, _ = run(spec_for(train="*.txt"), corpus, tmp_path / "s")
    parent = made.task_directory
    measured, _ = run(job("evaluate", parent, train="*.txt"), corpus, tmp_path / "s", parent)
    assert (measured.train_rows, measured.cached) == (0, False)
    tuned, _ = run(job("finetune", parent, train="*.txt"), corpus, tmp_path / "s", parent)
    assert tuned.train_rows > 0
    assert tuned.eval_rows == measured.eval_rows
    again, _ = run(job("quantize", parent, train="*.txt"), corpus, tmp_path / "s", parent)
    assert (again.cached, again.directory) == (True, tuned.directory)


def test_parents_that_differ_in_their_template_only_encode_apart(tmp_path, corpus):
    made, _ = run(spec_for(train="*.txt"), corpus, tmp_path / "s")
    parents = [tmp_path / name for name in ("first", "second")]
    for parent in parents:
        shutil.copytree(made.task_directory, parent)
    template = parents[1] / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_start|>", "<|endoftext|>"))
    turns = [{"role": "user", "content": "fox"}, {"role": "assistant", "content": "dog"}]
    (tmp_path / "x.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 30)
    done = [run(job("finetune", p, train="x.jsonl"), tmp_path, tmp_path / "s", p)[0] for p in parents]
    assert not done[1].cached
    first, second = (prepare.rows_of(d, d.train_files).take(np.zeros(1, np.int64))["input_ids"] for d in done)
    assert not np.array_equal(first, second)


OWN_TASK = """
from typing import ClassVar
import numpy as np
from jobs.tasks import Task, TaskOptions
from own_parts.words import words

class Options(TaskOptions):
    label_column: str = "label"

class MyTask(Task):
    name: ClassVar[str] = "mine"
    Options: ClassVar[type[TaskOptions]] = Options
    metrics: ClassVar[dict] = {"loss": "min", "f1": "max"}
    counted: ClassVar[dict] = {"long": "texts of more than two words"}

    def encode(self, examples):
        counts = np.array([words(e["text"]) for e in examples], np.int32)
        return {"words": counts, "targets": np.ones_like(counts), "long": (counts > 2).astype(np.int32)}
"""


def test_a_task_beside_the_spec_has_options_and_its_code_is_part_of_the_data(tmp_path, monkeypatch):
    package = tmp_path / "own_parts"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "task.py").write_text(OWN_TASK)
    (package / "words.py").write_text("def words(text):\n    return len(text.split())\n")
    (tmp_path / "x.jsonl").write_text("".join(f'{{"text": "{"a " * (i % 4 + 1)}"}}\n' for i in range(8)))
    (tmp_path / "x.yaml").write_text(
        "{name: x, phase: pretrain, task: 'own_parts.task:MyTask', model: {architecture: x},"
        " data: {train: x.jsonl, eval_fraction: 0, label_column: mood}, training: {steps: 1, eval_every: 1},"
        " checkpoint: {metric: f1}}"
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = specfile.load(tmp_path / "x.yaml", JobSpec)
    assert spec.task.options == {"label_column": "mood"}
    with pytest.raises(UserError, match=r"--set task\.label_colum: .*did you mean `label_column`"):
        specfile.load(tmp_path / "x.yaml", JobSpec, ["task.label_colum=x"])
    first, _ = run(spec, tmp_path, tmp_path / "s")
    assert first.notes[-1] == "4 of 8 texts of more than two words"
    assert prepare.rows_of(first, first.train_files).take(np.arange(4))["words"].tolist() == [1, 2, 3, 4]
    assert run(spec, tmp_path, tmp_path / "s")[0].cached
    (package / "words.py").write_text("def words(text):\n    return 2 * len(text.split())\n")
    assert not run(spec, tmp_path, tmp_path / "s")[0].cached


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
    assert read.targets(wanted) == whole["targets"][wanted].sum()
    assert read.take(wanted[:0])["input_ids"].shape == (0, 3)
    with pytest.raises(IndexError):
        read.take(np.array([20]))


@pytest.mark.parametrize("phase", ["evaluate", "quantize"])
def test_a_model_is_not_measured_by_what_it_did_not_learn(tmp_path, corpus, phase):
    """An encoder without a classifier of ours would be measured with a random one, by labels in an order of ours."""
    made, _ = run(spec_for(train="*.txt"), corpus, tmp_path / "s")
    parent = made.task_directory  # a tokenizer and no labels
    (corpus / "moods.csv").write_text("text,label\n" + "good,1\nbad,0\n" * 15)
    spec = job(phase, parent, task={"name": "text-classification"}, eval="moods.csv", eval_fraction=0.02)
    with pytest.raises(UserError, match=r"does not say that for text-classification .*: fine-tune it first"):
        run(spec, corpus, tmp_path / "s", parent)
    with pytest.raises(ValidationError, match=r"tokenizer\.train makes new tokens"):
        job(phase, parent, task={"name": "causal-lm", "tokenizer": {"train": "char"}}, train="*.txt")
