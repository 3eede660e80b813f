"""A model folder that asks for code of its own, or is a pickle, is refused before anything reads it."""

import json
from pathlib import Path

import pytest

from tracking import manifest, model_folder
from tracking.errors import TrackingError


def folder(path: Path, files: dict[str, object]) -> Path:
    path.mkdir(exist_ok=True)
    for name, content in files.items():
        (path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": {"model_type": "llama"}, "model.safetensors": ""},
        {"config.json": {"auto_map": {}}, "model-00001-of-2.safetensors": "", "pytorch_model.bin": ""},
        {"config.json": {"model_type": "llama"}, "model.safetensors": "", "training_args.bin": ""},
        {"config.json": "no JSON"},
        {},
    ],
)
def test_what_is_safe_has_no_problems(files, tmp_path):
    assert model_folder.problems(folder(tmp_path, files)) == []
    model_folder.check(tmp_path, "model.from: x")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"config.json": {"auto_map": {"AutoModel": "modeling.Own"}}}, r"config.json has `auto_map` \(modeling.Own\)"),
        ({"config.json": {"text_config": {"auto_map": {"AutoModel": "m.Own"}}}}, r"`auto_map` \(m.Own\)"),
        ({"tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["t.A", None]}}}, "tokenizer_config.json has"),
        ({"config.json": {}, "pytorch_model.bin": ""}, "pytorch_model.bin: weights in a pickle"),
        ({"a.pt": "", "b.ckpt": "", "training_args.bin": ""}, "a.pt and 1 more: weights in a pickle"),
    ],
)
def test_code_and_pickles_are_refused_by_the_file(files, said, tmp_path):
    with pytest.raises(TrackingError, match=f"model.from: x: .*{said}"):
        model_folder.check(folder(tmp_path, files), "model.from: x")


def test_all_problems_are_said_at_once(tmp_path):
    files = {
        "config.json": {"auto_map": {"A": "a.A"}},
        "tokenizer_config.json": {"auto_map": {"T": "t.T"}},
        "m.bin": "",
    }
    assert len(model_folder.problems(folder(tmp_path, files))) == 3


def test_quantisation_is_read_from_the_manifest_else_from_the_config(tmp_path):
    assert model_folder.quantisation(folder(tmp_path, {"config.json": {"model_type": "llama"}})) is None
    folder(tmp_path, {"config.json": {"quantization_config": {"quant_method": "awq"}}})
    assert model_folder.quantisation(tmp_path) == "awq"
    about = manifest.ModelManifest(name="x", task="causal-lm", architecture="llama", quantization={"method": "int8"})
    manifest.write(tmp_path, about)
    assert model_folder.quantisation(tmp_path) == "int8"
