"""Weights that a model lacks, or that do not fit it, are not made up."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from jobs.tasks import TaskError, get
from jobs.tasks.causal_lm import CausalLM
from jobs.tasks.image_classification import ImageClassification
from tests.support import tiny_models

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.language_model(tmp_path_factory.mktemp("models") / "whole", context=64, hidden=32)


def changed(whole: Path, to: Path, change: Any) -> Path:
    """Return a copy of a model whose weights are `change(name, tensor)`, None to leave one out."""
    shutil.copytree(whole, to)
    kept = {name: change(name, tensor) for name, tensor in load_file(whole / WEIGHTS).items()}
    named = {pair[0]: pair[1].contiguous() for pair in kept.values() if pair is not None}
    save_file(named, to / WEIGHTS, {"format": "pt"})
    return to


def load(directory: Path, config: dict[str, Any] | None = None) -> tuple[CausalLM, torch.nn.Module]:
    task = CausalLM.load(directory, {"sequence_length": 16})
    return task, task.load_model(directory, torch.float32, config)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda name, it: None if "layers.1" in name else (name, it), r"9 weights \(model\.layers\.1\..* and 6 more\)"),
        (lambda name, it: None if name == "lm_head.weight" else (name, it), r"1 weight \(lm_head\.weight\)"),
        (lambda name, it: (f"other.{name}", it), "21 weights .* of another model or layout"),
    ],
)
def test_weights_that_are_missing_are_no_random_ones(whole: Path, tmp_path: Path, change: Any, said: str) -> None:
    with pytest.raises(TaskError, match=f"are not whole: {said}"):
        load(changed(whole, tmp_path / "parent", change))


def test_weights_that_are_left_out_are_said(whole: Path, tmp_path: Path) -> None:
    task, _ = load(whole)
    assert task.said == []
    task, _ = load(whole, {"num_hidden_layers": 1})
    assert task.said[0].startswith(f"{whole} holds 9 weights (model.layers.1.")
    assert task.said[0].endswith("that LlamaForCausalLM has no place for: left out")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"num_hidden_layers": 3}, "9 weights .*model.config asks for more than there is"),
        ({"vocab_size": 400}, r"lm_head.weight is \(320, 32\) there, and \(400, 32\) by the config"),
        ({"hiden_size": 8}, "llama has no 'hiden_size'; did you mean 'hidden_size'"),
        ({"trust_remote_code": True}, "llama has no 'trust_remote_code'"),
        ({"ignore_mismatched_sizes": True}, "llama has no 'ignore_mismatched_sizes'"),
        ({"dtype": "float16"}, "'dtype' is no entry .*: training.precision"),
        ({"quantization_config": {"load_in_8bit": True}}, "phase quantize"),
    ],
)
def test_entries_that_the_weights_or_the_config_do_not_take_are_refused(
    whole: Path, config: dict[str, Any], said: str
) -> None:
    with pytest.raises(TaskError, match=said):
        load(whole, config)


def test_entries_of_a_config_are_honoured(whole: Path) -> None:
    _, model = load(whole, {"attention_dropout": 0.5})
    assert model.config.attention_dropout == 0.5  # type: ignore[union-attr]


def test_a_pickle_is_not_read_whatever_lies_beside_it(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "parent")
    torch.save(load_file(whole / WEIGHTS), tmp_path / "parent" / "pytorch_model.bin")
    (tmp_path / "parent" / WEIGHTS).rename(tmp_path / "parent" / "consolidated.safetensors")
    with pytest.raises(TaskError, match="cannot load a model from"):
        load(tmp_path / "parent")


def test_an_encoder_may_lack_its_head_alone(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    encoder = AutoModel.from_config(AutoConfig.for_model("bert", vocab_size=320, **sizes))
    encoder.save_pretrained(tmp_path / "encoder")
    tiny_models.tokenizer().save_pretrained(tmp_path / "encoder")
    task = get("text-classification")({})
    task.inherit(tmp_path / "encoder")
    task.labels = ["a", "b"]  # type: ignore[attr-defined]
    task.load_model(tmp_path / "encoder")
    assert "lacks 2 weights (classifier.bias, classifier.weight): random until trained" in task.said[0]
    without = changed(tmp_path / "encoder", tmp_path / "b", lambda n, it: None if "layer.0" in n else (n, it))
    with pytest.raises(TaskError, match="are not whole"):
        task.load_model(without)
    task.save(tmp_path / "encoder")  # a classifier of Tandem's has its head
    with pytest.raises(TaskError, match="are not whole: 2 weights"):
        task.load_model(tmp_path / "encoder")


def test_a_head_of_its_own_under_a_tied_config_is_kept_and_said(tmp_path: Path) -> None:
    """transformers keeps both, and leaves a config that ties them for whoever reads the model next."""
    fast = tiny_models.tokenizer()
    model = tiny_models.decoder("llama", vocab_size=len(fast), num_hidden_layers=1, tie_word_embeddings=True)
    parent = tiny_models.export(tmp_path / "parent", fast, model)
    weights = load_file(parent / WEIGHTS)
    assert "lm_head.weight" not in weights
    task, tied = load(parent)
    assert (list(task.said), tied.config.tie_word_embeddings) == ([], True)
    head = torch.randn_like(weights["model.embed_tokens.weight"])
    save_file({**weights, "lm_head.weight": head}, parent / WEIGHTS, {"format": "pt"})
    task, loaded = load(parent)
    assert torch.equal(loaded.lm_head.weight, head)
    assert not loaded.config.tie_word_embeddings
    assert "the files hold a head of its own: it is kept, and untied" in task.said[0]


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("resnet", {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"}),
        ("convnext", {"hidden_sizes": [4, 8], "depths": [1, 1], "num_stages": 2}),
        ("vit", {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}),
        ("cnn", {"width": 8, "hidden_size": 8}),
    ],
)
def test_image_classifiers_load_as_they_were_written(architecture: str, config: dict[str, Any], tmp_path: Path) -> None:
    """Convolutional ones have no embedding, and transformers raises where one is asked for."""
    task = ImageClassification(ImageClassification.Options())
    task.labels, task.size, task.channels = ["a", "b"], (16, 16), 1
    written = task.build(architecture, config)
    written.save_pretrained(str(tmp_path))  # type: ignore[operator]
    loaded = task.load_model(tmp_path).state_dict()
    assert loaded.keys() == written.state_dict().keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in written.state_dict().items())
    assert list(task.said) == []


def test_a_quantised_model_whose_library_is_not_there_is_a_sentence(whole: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("bitsandbytes") is not None:
        pytest.skip("bitsandbytes is installed")
    shutil.copytree(whole, tmp_path / "parent")
    config = json.loads((whole / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "parent" / "config.json").write_text(json.dumps(config))
    with pytest.raises(TaskError, match=r"cannot load a model from .*bitsandbytes"):
        load(tmp_path / "parent")


def test_the_template_that_is_used_of_two_is_said(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "parent")
    path = tmp_path / "parent" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": "{{ messages }}"}))
    task = CausalLM({"sequence_length": 16})
    task.inherit(tmp_path / "parent")
    assert task.tokenizer.chat_template == tiny_models.CHAT_TEMPLATE
    assert "that of chat_template.jinja is used" in task.inherited()[0]
