"""Prepared rows are used again only where all that decides them is the same; a run goes on with its own data only."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluster.errors import UserError
from jobs.data import corpora, identity, prepare, sources
from jobs.data.identity import Noted
from jobs.run_folder import RunFolder
from jobs.spec import JobSpec
from jobs.worker.evaluate import sample
from tests.support import tiny_models

TEXT = {"name": "causal-lm", "tokenizer": {"train": "bpe", "vocab_size": 300}, "sequence_length": 16}
TUNED = {"name": "causal-lm", "sequence_length": 64}


def spec_for(task: str | dict = TEXT, **data) -> JobSpec:
    values = {"name": "x", "phase": "pretrain", "task": task, "model": {"architecture": "llama"}}
    return JobSpec.model_validate({**values, "data": {"train": "x.jsonl", **data}, "training": {"steps": 1}})


def run(spec: JobSpec, base: Path, parent: Path | None = None, before: Noted | None = None) -> prepare.Prepared:
    return prepare.prepare(spec, base, base / "storage", parent=parent, on_progress=lambda *event: None, before=before)


@pytest.fixture
def base(tmp_path):
    turns = [[{"role": "user", "content": f"fox {n}"}, {"role": "assistant", "content": f"dog {n}"}] for n in range(30)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
    return tmp_path


@pytest.fixture
def parent(tmp_path):
    tiny_models.tokenizer().save_pretrained(tmp_path / "parent")
    return tmp_path / "parent"


def edited(path: Path) -> None:
    path.write_text(path.read_text().replace("<|im_start|>", "<|im_end|>"))


CHANGES = {
    "a byte": lambda folder: (folder / "x.jsonl").write_text(
        (folder / "x.jsonl").read_text().replace("dog 7", "dog 8")
    ),
    "a row": lambda folder: (folder / "x.jsonl").open("a").write((folder / "x.jsonl").read_text().splitlines()[0]),
    "the template": lambda folder: edited(folder / "parent" / "chat_template.jinja"),
    "another template": lambda folder: (
        (folder / "parent" / "additional_chat_templates").mkdir()
        or (folder / "parent" / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    ),
    "the tokenizer": lambda folder: (folder / "parent" / "tokenizer.json").open("a").write(" "),
    "the legacy template": lambda folder: (folder / "parent" / "chat_template.json").write_text("{}"),
    "added tokens": lambda folder: (folder / "parent" / "added_tokens.json").write_text("{}"),
    "the class that reads it": lambda folder: (folder / "parent" / "config.json").write_text('{"model_type": "qwen2"}'),
}


@pytest.mark.parametrize("source", ["from", "parent"])
@pytest.mark.parametrize("change", CHANGES)
def test_nothing_that_decides_the_rows_may_change(base, parent, change, source):
    named = {**TUNED, "tokenizer": {"from": str(parent)}}
    spec, start = (spec_for(named), None) if source == "from" else (spec_for(TUNED), parent)
    first = run(spec, base, start)
    assert run(spec, base, start).cached
    CHANGES[change](base)
    second = identity.parts_of(spec, sources.open_source("x.jsonl", base), None, start, base)
    differ = identity.changed(first.parts, second)
    assert differ == (["train"] if change in ("a byte", "a row") else ["tokenizer" if source == "from" else "parent"])


def test_what_does_not_decide_the_rows_does_not_count(base, parent):
    first = run(spec_for(TUNED), base, parent)
    for name in ("model.safetensors", "tandem.json", "generation_config.json", "README.md", "pytorch_model.bin"):
        (parent / name).write_text(f"{name} of another version")
    (parent / "config.json").write_text('{"hidden_size": 8}')
    (base / "y.jsonl").write_bytes((base / "x.jsonl").read_bytes())
    named = identity.parts_of(spec_for(TUNED), sources.open_source("y.jsonl", base), None, parent, base)
    assert identity.changed(first.parts, named) == ["parent"], "a config.json that was not there"
    (parent / "config.json").write_text('{"hidden_size": 16}')
    later = identity.parts_of(spec_for(TUNED), sources.open_source("y.jsonl", base), None, parent, base)
    assert later == named


@pytest.mark.parametrize(("one", "other"), [("x.jsonl", "x.json"), ("x.txt", "x.csv"), ("x.csv", "x.tsv")])
def test_the_same_bytes_read_otherwise_are_other_data(tmp_path, one, other):
    for name in (one, other):
        (tmp_path / name).write_text('{"text": "some words"}\n')
    first, second = (sources.open_source(name, tmp_path) for name in (one, other))
    assert first.digest == second.digest
    parts = [identity.parts_of(spec_for(), source, None, None, tmp_path) for source in (first, second)]
    assert identity.changed(*parts) == ["reading"]


def test_the_order_of_files_and_the_labels_of_images_count(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(name)
    orders = [sources.open_source(order, tmp_path).digest for order in (["a.txt", "b.txt"], ["b.txt", "a.txt"])]
    assert orders[0] != orders[1]
    for name in ("cat/1.png", "dog/2.png"):
        (tmp_path / "set" / name).parent.mkdir(parents=True)
        (tmp_path / "set" / name).write_bytes(b"pixels")
    before = sources.open_source("set", tmp_path).digest
    (tmp_path / "set" / "dog").rename(tmp_path / "set" / "fox")
    assert sources.open_source("set", tmp_path).digest != before


def test_an_image_that_a_row_names_counts_with_every_byte(tmp_path):
    for number, shade in enumerate([0, 50, 100, 150] * 2):
        Image.fromarray(np.full((4, 4), shade + number, np.uint8)).save(tmp_path / f"{number}.png")
    rows = [{"image": str(tmp_path / f"{number}.png"), "label": number % 2} for number in range(8)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = spec_for("image-classification", eval_fraction=0.25)
    first = run(spec, tmp_path)
    assert run(spec, tmp_path).cached
    Image.fromarray(np.full((4, 4), 255, np.uint8)).save(tmp_path / "3.png")
    with pytest.raises(UserError, match=r"the files that the data names \(images\) changed"):
        run(spec, tmp_path, before=noted(first))
    assert not run(spec, tmp_path).cached
    shutil.copy(tmp_path / "1.png", tmp_path / "3.png")
    assert any("1 of 8 examples are copies" in note for note in run(spec, tmp_path).notes), "under another name"


def test_a_data_set_of_the_hubs_client_is_known_by_its_rows(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "set").mkdir()
    digests = []
    for word in ("one", "two", "one"):
        (tmp_path / "set" / "train.jsonl").write_text(f'{{"text": "{word}"}}\n')
        source = sources.open_source(f"hf://{tmp_path}/set", tmp_path)
        assert [row["text"] for row in source.examples()] == [word]
        digests.append(source.digest)
    assert digests[0] == digests[2] != digests[1]


def test_the_built_in_corpora_are_known_by_every_byte(tmp_path):
    found = []
    for content in ("x = 1", "x = 2", "x = 1"):
        (tmp_path / "module.py").write_text(content)
        found.append(corpora.digest([tmp_path / "module.py"]))
    assert found[0] == found[2] != found[1]
    assert "sklearn-digits" in sources.open_source("sklearn-digits", Path()).reading


def noted(prepared: prepare.Prepared) -> Noted:
    return Noted(prepared.parts, prepared.rows)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("a row", r"the training data \(data\.train or .*\) changed"),
        ("the template", r"chat template or labels .* changed"),
    ],
)
def test_a_run_goes_on_with_its_own_data_only(base, parent, change, said):
    first = run(spec_for(TUNED), base, parent)
    assert run(spec_for(TUNED), base, parent, noted(first)).notes == first.notes
    kept = {path: path.read_bytes() for path in (base / "x.jsonl", parent / "chat_template.jinja")}
    CHANGES[change](base)
    with pytest.raises(UserError, match=f"{said}.*checkpoint.resume=never"):
        run(spec_for(TUNED), base, parent, noted(first))
    assert len(list((base / "storage" / "data").iterdir())) == 1, "it was refused before it was encoded"
    assert run(spec_for(TUNED), base, parent, Noted()).train_rows, "a run from before this was noted goes on"
    for path, content in kept.items():
        path.write_bytes(content)
    assert run(spec_for(TUNED), base, parent, noted(first)).cached


def test_another_reading_matters_where_it_makes_other_rows(base):
    spec = spec_for({**TEXT, "sequence_length": 64})
    first = run(spec, base)
    before = Noted({**first.parts, "libraries": "of another version"}, first.rows)
    assert "a library that encodes" in run(spec, base, before=before).notes[-1]
    with pytest.raises(UserError, match="a library that encodes"):
        run(spec, base, before=Noted(before.parts, "other rows"))


def test_code_of_ones_own_task_that_makes_other_rows_is_refused(tmp_path, monkeypatch):
    code = (
        "import numpy as np\nfrom jobs.tasks import Task\n\nclass Mine(Task):\n    name = 'mine'\n"
        "    def encode(self, examples):\n        return {'targets': np.full(len(examples), FACTOR, np.int32)}\n"
    )
    (tmp_path / "own_factor.py").write_text(code.replace("FACTOR", "1"))
    (tmp_path / "x.jsonl").write_text("".join(f'{{"text": "{n}"}}\n' for n in range(8)))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    spec = spec_for("own_factor:Mine", eval_fraction=0)
    first = run(spec, tmp_path)
    (tmp_path / "beside.py").write_text("# another script\n")
    assert "the code of your own task changed; the encoded rows are the same" in run(
        spec, tmp_path, before=noted(first)
    ).notes[-1]  # fmt: skip
    (tmp_path / "own_factor.py").write_text(code.replace("FACTOR", "2"))
    monkeypatch.delitem(sys.modules, "own_factor")
    with pytest.raises(UserError, match="the code of your own task changed"):
        run(spec, tmp_path, before=noted(first))


def test_a_run_folder_remembers_its_data(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.data() is None
    folder.keep_data(Noted({"train": "abc"}, "rows"))
    assert RunFolder(tmp_path, resumed=True).data() == Noted({"train": "abc"}, "rows")


def test_what_is_evaluated_is_a_seeded_sample_of_the_held_out_rows():
    chosen = sample(1000, 100, 0)
    assert len(set(chosen)) == 100
    assert chosen.max() > 900, "not the first ones"
    assert np.array_equal(chosen, np.sort(chosen))
    assert np.array_equal(chosen, sample(1000, 100, 0))
    assert not np.array_equal(chosen, sample(1000, 100, 1))
    assert np.array_equal(sample(5, None, 0), np.arange(5))
    assert np.array_equal(sample(5, 9, 0), np.arange(5))
