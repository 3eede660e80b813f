"""Quantisation that saves nothing is refused, and leaves nothing that could be taken for int8."""

from pathlib import Path

import pytest

from cluster.errors import UserError
from jobs.data import prepare
from jobs.spec import JobSpec
from jobs.worker.quantize import quantize

CONFIGS = {
    "ngram": {"hidden_size": 64, "buckets": 4096},
    "bert": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256},
}


def made(folder: Path, architecture: str) -> tuple[JobSpec, prepare.Prepared, Path]:
    """Prepare a table of texts and export a classifier with random weights."""
    (folder / "moods.csv").write_text("text,label\n" + "".join(f"good film {n},1\nbad film {n},0\n" for n in range(15)))
    task = {"name": "text-classification", "max_length": 8, "tokenizer": {"train": "word", "vocab_size": 64}}
    values = {"name": "x", "phase": "pretrain", "task": task, "model": {"architecture": architecture}}
    training = JobSpec.model_validate({**values, "data": {"train": "moods.csv"}, "training": {"steps": 1}})
    learned = prepare.prepare(training, folder, folder / "s", parent=None, on_progress=lambda *event: None)
    model = folder / "model"
    model.mkdir()
    loaded = learned.task(training)
    loaded.build(architecture, CONFIGS[architecture]).save_pretrained(model)
    loaded.save(model)
    values = {"name": "q", "phase": "quantize", "task": {"name": "text-classification"}, "model": {"from": str(model)}}
    spec = JobSpec.model_validate({**values, "data": {"eval": "moods.csv"}})
    prepared = prepare.prepare(spec, folder, folder / "s", parent=model, on_progress=lambda *event: None)
    return spec, prepared, model


def test_a_model_without_linear_layers_to_speak_of_is_refused(tmp_path):
    spec, prepared, model = made(tmp_path, "ngram")
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match="saves nothing"):
        quantize(spec, str(model), prepared, "fp32", str(tmp_path / "int8"))
    assert {path.name for path in tmp_path.iterdir()} == before


def test_one_with_them_becomes_smaller(tmp_path):
    spec, prepared, model = made(tmp_path, "bert")
    report = quantize(spec, str(model), prepared, "fp32", str(tmp_path / "int8"))
    assert report["bytes"] < 0.6 * report["parent_bytes"]
    assert (tmp_path / "int8" / "model.safetensors").is_file()
