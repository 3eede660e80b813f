"""A model folder that asks for code of its own, or is a pickle, is refused before anything reads it."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

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
        {"vocab.json": {"auto_map": 7}, "other_vocab.json": {"auto_map": 7, "trust_remote_code": 1}},
        {"tokenizer.json": {"model": {"auto_map": "a"}}, "config.json": {"auto_map": {"T": [None, None]}}},
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
        ({"generation_config.json": {"auto_map": {"G": "g.G"}}}, "generation_config.json has"),
        ({"preprocessor_config.json": {"auto_map": {"AutoImageProcessor": "i.I"}}}, "preprocessor_config.json has"),
        ({"video_preprocessor_config.json": {"auto_map": {"V": "v.V"}}}, "video_preprocessor_config.json has"),
        ({"image_processor.json": {"inner": [{"auto_map": "i.I"}]}}, r"image_processor.json has `auto_map` \(i.I\)"),
        ({"config.json": {"custom_pipelines": {"p": {"impl": "pipe.Own"}}}}, r"has `custom_pipelines` \(pipe.Own\)"),
        ({"tokenizer_config.json": {"trust_remote_code": True}}, "tokenizer_config.json has `trust_remote_code`"),
        (
            {"adapter_config.json": {"base_model_name_or_path": "a/b"}},
            "holds an adapter for a/b, not a whole model: me",
        ),
        ({"adapter_config.json": {}, "config.json": {}}, "adapter_config.json: an adapter lies beside the weights"),
        ({"config.json": {}, "adapter_model.safetensors": "", "model.bin": ""}, "model.bin: weights in a pickle"),
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


def test_code_that_generates_is_refused(tmp_path):
    (tmp_path / "custom_generate").mkdir()
    (tmp_path / "custom_generate" / "generate.py").write_text("raise SystemExit")
    with pytest.raises(TrackingError, match=r"generate\.py: the model generates by code of its own"):
        model_folder.check(tmp_path, "models.m")


def test_weights_that_are_not_whole_are_named(tmp_path):
    save_file({"a": torch.zeros(4)}, tmp_path / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    folder(tmp_path, {"model.safetensors.index.json": index})
    (lacking,) = model_folder.damage(tmp_path)
    assert "model.safetensors.index.json names model-2.safetensors, and that is not there" in lacking
    save_file({"b": torch.zeros(4)}, tmp_path / "model-2.safetensors")
    assert model_folder.damage(tmp_path) == []
    content = (tmp_path / "model-2.safetensors").read_bytes()
    (tmp_path / "model-2.safetensors").write_bytes(content[:-1])
    (cut,) = model_folder.damage(tmp_path)
    assert f"model-2.safetensors has {len(content) - 1} bytes, its header says {len(content)}" in cut
    for broken in (b"", b"version https://git-lfs.github.com/spec/v1", content[:20]):
        (tmp_path / "model-2.safetensors").write_bytes(broken)
        (said,) = model_folder.damage(tmp_path)
        assert "is no whole safetensors file" in said


def test_a_quantisation_config_within_a_part_counts(tmp_path):
    nested = {"text_config": {"quantization_config": {"quant_method": "fp8"}}}
    assert model_folder.quantisation(folder(tmp_path, {"config.json": nested})) == "fp8"
    assert model_folder.quantisation(folder(tmp_path, {"config.json": {"quantization_config": {"bits": 4}}})) == (
        "a method it does not name"
    )


def test_weights_that_are_quantised_without_saying_so_are_told_by_their_header(tmp_path):
    save_file({"q_proj.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    assert model_folder.quantisation(tmp_path) == "model.safetensors holds q_proj.weight as F8_E4M3"
    (said,) = model_folder.damage(tmp_path)
    assert "config.json has no quantization_config to read it by" in said
    save_file({"q_proj.qweight": torch.zeros(4, 4, dtype=torch.int32)}, tmp_path / "model.safetensors")
    assert "q_proj.qweight as I32" in str(model_folder.quantisation(tmp_path))
    folder(tmp_path, {"config.json": {"quantization_config": {"quant_method": "gptq"}}})
    assert model_folder.quantisation(tmp_path) == "gptq"
    assert model_folder.damage(tmp_path) == []


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"generation_config.json": "no JSON"}, "generation_config.json is no JSON object"),
        ({"tokenizer_config.json": "[1]"}, "tokenizer_config.json is no JSON object"),
        ({"generation_config.json": {"eos_token_id": [2, "3"]}}, r"eos_token_id is \[2, '3'\], not a token's number"),
        ({"generation_config.json": {"pad_token_id": True}}, "pad_token_id is True, not a token's number"),
        ({"generation_config.json": {"temperature": "hot"}}, "temperature is 'hot', not a number"),
    ],
)
def test_configs_that_cannot_be_read_are_damage(files, said, tmp_path):
    (found,) = model_folder.damage(folder(tmp_path, files))
    assert re.search(said, found)


def test_a_generation_config_as_published_is_none(tmp_path):
    published = {
        "eos_token_id": [1, 106],
        "pad_token_id": 0,
        "top_k": 64,
        "top_p": 0.95,
        "temperature": 1,
        "min_p": None,
    }
    assert model_folder.damage(folder(tmp_path, {"generation_config.json": published})) == []
