"""What is left out, cut, chosen or without effect is said in the log of the job, by its number and its name."""

import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from cluster.errors import UserError
from jobs import first_look
from jobs.data import prepare, sources
from jobs.spec import JobSpec
from jobs.tasks import tokenization

TEXT = {"name": "causal-lm", "tokenizer": {"train": "bpe", "vocab_size": 300}, "sequence_length": 16}
WORDS = {"name": "text-classification", "tokenizer": {"train": "word"}, "max_length": 8}
ROWS = "".join(json.dumps({"text": f"document {n}"}) + "\n" for n in range(4))
OTHERS = "".join(json.dumps({"text": f"other {n}"}) + "\n" for n in range(3))
ARCHITECTURES = {"causal-lm": "llama", "text-classification": "ngram", "image-classification": "cnn"}


def write(folder: Path, files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def prepared(base: Path, task: dict | None = None, **data) -> prepare.Prepared:
    """Prepare data of which nothing is held out, unless it says so."""
    task = task or TEXT
    spec = JobSpec.model_validate(
        {
            "name": "x",
            "phase": "pretrain",
            "task": task,
            "model": {"architecture": ARCHITECTURES[task["name"]]},
            "data": {"eval_fraction": 0, **data},
            "training": {"steps": 1},
        }
    )
    return prepare.prepare(spec, base, base / "storage", parent=None, on_progress=lambda *_: None)


def said(base: Path, task: dict | None = None, **data) -> str:
    return "\n".join(prepared(base, task, **data).notes)


# -- places and files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "train",
    [
        ["c", "c/a.jsonl"],
        ["c/*.jsonl", "c/a.jsonl"],
        ["c/a.jsonl", "c/b.jsonl", "./c/../c/a.jsonl"],
        ["c", "link.jsonl"],
    ],
)
def test_a_file_that_two_places_name_is_read_once(tmp_path, train):
    write(tmp_path, {"c/a.jsonl": ROWS, "c/b.jsonl": OTHERS})
    (tmp_path / "link.jsonl").symlink_to("c/a.jsonl")
    found = prepared(tmp_path, train=train)
    assert "made of 7 examples to train on, 0 held out" in found.notes
    assert any("1 file left out (named before: each file is read once)" in note for note in found.notes)


def test_a_folder_of_images_that_is_named_twice_is_read_once(tmp_path):
    for label in "ab":
        (tmp_path / "i" / label).mkdir(parents=True)
        Image.new("L", (4, 4)).save(tmp_path / "i" / label / "1.png")
    source = sources.open_source(["i", "./i"], tmp_path)
    assert len(list(source.examples())) == 2
    assert source.notes == ("1 file left out (named before: each file is read once): i",)


def test_copies_are_counted_where_nothing_is_held_out_too(tmp_path):
    write(tmp_path, {"c/a.jsonl": ROWS, "c/b.jsonl": ROWS, "e.jsonl": OTHERS})
    assert "4 of 8 examples are copies of an earlier one" in said(tmp_path, train="c")
    assert "4 of 8 examples are copies of an earlier one" in said(tmp_path, train="c", eval="e.jsonl")


@pytest.mark.parametrize(("name", "content"), [("b.jsonl", ""), ("b.jsonl", "\n\n"), ("b.csv", "text\n")])
def test_files_without_an_example_are_named(tmp_path, name, content):
    write(tmp_path, {"c/a.jsonl": ROWS, f"c/{name}": content})
    assert f"1 of the files hold no example: {name}" in said(tmp_path, train="c")
    assert f"1 of the files hold no example: {name}" in said(tmp_path, train=["c/a.jsonl", f"c/{name}"])


def test_plain_text_beside_rows_is_named(tmp_path):
    write(tmp_path, {"c/a.jsonl": ROWS, "c/urls.txt": "http://x", "d/a.txt": "one", "d/b.md": "two"})
    assert "c: 1 file of plain text beside files of rows, each read as one text: urls.txt" in said(tmp_path, train="c")
    assert "plain text" not in said(tmp_path, train="d")


@pytest.mark.parametrize(
    ("names", "read"),
    [
        (["train/a.jsonl", "test/a.jsonl"], "test, train are all read"),
        (["my_train.jsonl", "my.eval.jsonl"], "my.eval.jsonl, my_train.jsonl are all read"),
        (["train-00000-of-00001.jsonl", "validation-00000-of-00001.jsonl"], "are all read"),
    ],
)
def test_a_test_set_beside_the_training_set_is_said(tmp_path, names, read):
    write(tmp_path, {f"c/{name}": ROWS + f'{{"text": "{name}"}}\n' for name in names})
    assert read in said(tmp_path, train="c")
    assert read in "\n".join(sources.open_source("c/**", tmp_path).notes)


def test_a_place_above_the_data_is_no_split(tmp_path):
    write(tmp_path, {"test/c/train.jsonl": ROWS, "test/c/more.jsonl": OTHERS})
    assert "all read" not in said(tmp_path / "test", train="c/*.jsonl")


@pytest.mark.parametrize("where", ["ftp://b/a.jsonl", "https://host/a.jsonl"])
def test_a_url_is_no_file(tmp_path, where):
    with pytest.raises(UserError, match=r"is a URL that is not read; s3://, .* are, and files: download it"):
        sources.open_source(where, tmp_path)


def test_several_places_in_one_text_are_told_to_be_a_list(tmp_path):
    with pytest.raises(UserError, match=r"several places are a list: \[a, b\]"):
        sources.open_source("a.jsonl,b.jsonl", tmp_path)


# -- examples -------------------------------------------------------------------------------------------------------


def test_columns_that_have_no_effect_are_named_with_their_number(tmp_path):
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    rows = [{"messages": chat, "id": n, "source": "web" if n else None, "system": "Be kind."} for n in range(3)]
    write(tmp_path, {"x.jsonl": "".join(json.dumps(row) + "\n" for row in rows)})
    assert "columns that have no effect: 'id' (in 3), 'source' (in 2)" in said(
        tmp_path, {**TEXT, "sequence_length": 64}, train="x.jsonl"
    )
    write(tmp_path, {"y.csv": "text,label,weight\na,0,5\nb,1,\n"})
    assert "columns that have no effect: 'weight' (in 1)" in said(tmp_path, WORDS, train="y.csv")


def test_rows_of_several_examples_say_how_many(tmp_path):
    write(tmp_path, {"x.jsonl": ROWS, "y.csv": "text,label\na,0\nb,1\n"})
    assert "made of 3 examples to train on, 1 held out" in said(tmp_path, train="x.jsonl", eval_fraction=0.25)
    assert "made of" not in said(tmp_path, WORDS, train="y.csv")


def test_special_tokens_in_texts_are_counted(tmp_path):
    write(tmp_path, {"x.jsonl": '{"text": "a<|endoftext|>b"}\n{"text": "plain"}\n'})
    assert "1 of 2 texts have special tokens written into them, which become these tokens" in said(
        tmp_path, train="x.jsonl"
    )
    write(tmp_path, {"y.csv": "text,label\na <|pad|>,0\nb,1\n"})
    assert "1 of 2 texts have special tokens written" in said(tmp_path, WORDS, train="y.csv")


def test_characters_that_the_tokenizer_does_not_know_are_counted(tmp_path):
    write(tmp_path, {"x.jsonl": '{"text": "abc"}\n', "e.jsonl": '{"text": "abz"}\n{"text": "cab"}\n'})
    task = {"name": "causal-lm", "sequence_length": 8, "tokenizer": {"train": "char"}}
    notes = prepared(tmp_path, task, train="x.jsonl", eval="e.jsonl").notes
    assert "held out: 1 of 2 texts have characters that the tokenizer does not know" in notes
    assert not any(note.startswith("1 of 1") for note in notes)


def test_what_the_spec_says_to_no_effect_is_said(tmp_path):
    write(tmp_path, {"x.jsonl": ROWS, "e.jsonl": OTHERS})
    assert "data.eval_fraction has no effect: what is held out is data.eval" in said(
        tmp_path, train="x.jsonl", eval="e.jsonl", eval_fraction=0.5
    )
    assert "no effect" not in said(tmp_path, train="x.jsonl")


# -- a parent ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """The tokenizer of a model that knows ChatML's tokens and has no template."""
    folder = tmp_path_factory.mktemp("parent")
    tokenization.train("bpe", 300, ["some text"]).save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    return folder


def finetuning(parent: Path, train: str = "x.jsonl", task: dict | None = None) -> JobSpec:
    values = {"name": "x", "phase": "finetune", "training": {"steps": 1}, "data": {"train": train, "eval_fraction": 0}}
    return JobSpec.model_validate({**values, "task": task or {"name": "causal-lm"}, "model": {"from": str(parent)}})


def test_a_chat_template_that_is_given_is_said(tmp_path, parent):
    write(tmp_path, {"x.jsonl": ROWS})
    own = tmp_path / "own"
    shutil.copytree(parent, own)
    (own / "chat_template.jinja").write_text(tokenization.CHATML)

    def notes(folder: Path, task: dict | None = None) -> str:
        spec = finetuning(folder, task=task)
        done = prepare.prepare(spec, tmp_path, tmp_path / "s", parent=folder, on_progress=lambda *_: None)
        return "\n".join(done.notes)

    assert f"the tokenizer of {parent} brings no chat template: it is given ChatML" in notes(parent)
    assert "ChatML" not in notes(own)
    named = {"name": "causal-lm", "tokenizer": {"from": str(parent)}}
    assert f"the tokenizer of {parent} brings no chat template: it is given ChatML" in notes(own, named)


@pytest.mark.parametrize("train", ["c", "c/*", "a" * 5000, "nothing.jsonl"])
def test_a_look_at_data_that_cannot_be_seen_leaves_it_to_the_job(tmp_path, parent, train):
    write(tmp_path, {"c/a.jsonl": ROWS})
    (tmp_path / "c/gone.jsonl").symlink_to("nowhere")
    first_look.check(finetuning(parent, train), tmp_path, parent)


def test_a_look_takes_patterns_too(tmp_path, parent):
    own = tmp_path / "own"
    shutil.copytree(parent, own)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (own / name).write_text((own / name).read_text().replace("<|im_start|>", "<|other|>"))
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    write(tmp_path, {"c/a.jsonl": json.dumps({"messages": chat})})
    with pytest.raises(UserError, match="has no chat template"):
        first_look.check(finetuning(own, "c/*.jsonl"), tmp_path, own)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_no_empty_one(tmp_path):
    write(tmp_path, {"c/a/x.jsonl": ROWS, "c/b/x.jsonl": OTHERS})
    (tmp_path / "c/b").chmod(0)
    try:
        with pytest.raises(UserError, match=r"cannot read .*c/b: Permission denied"):
            sources.open_source("c/*/*.jsonl", tmp_path)
    finally:
        (tmp_path / "c/b").chmod(0o700)
