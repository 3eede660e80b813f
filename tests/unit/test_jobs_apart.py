"""Adapters kept apart from their base load as the merged export does, everywhere and in parts, or not at all."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from cluster.errors import UserError
from jobs import lineage, parents
from jobs.driver import publish
from jobs.spec import JobSpec, LoraSpec
from jobs.tasks import TaskError, adapters, loading
from jobs.tasks.causal_lm import CausalLM
from jobs.worker import apart, start
from jobs.worker.lora import add_lora
from serve.deploy import plan
from serve.spec import ServeSpec
from tests.support import hub, tiny_models
from tests.support.adapters_apart import loaded, merged, trained, written
from tracking import manifest, model_folder, weights_digest
from tracking.errors import TrackingError

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
PARENTS = {"llama tied": ("llama", {"tie_word_embeddings": True}), "llama": ("llama", {"tie_word_embeddings": False})}
PARENTS |= {"gpt2": ("gpt2", {}), "qwen3_moe": ("qwen3_moe", EXPERTS)}
TOKENS = torch.arange(12).view(2, 6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of each kind to start from."""
    folder = tmp_path_factory.mktemp("models")
    fast = tiny_models.tokenizer()
    for name, (kind, changes) in PARENTS.items():
        sizes = {"vocab_size": len(fast), "num_hidden_layers": 1, **changes}
        tiny_models.export(folder / name, fast, tiny_models.decoder(kind, spread=0.2, **sizes))
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(TOKENS).logits


CASES = [*((name, "both", "bf16") for name in PARENTS), *((name, "all-linear", "fp32") for name in PARENTS)]
CASES += [("llama tied", "head", "fp32"), ("llama tied", "head", "bf16")]


@pytest.mark.parametrize(("name", "targets", "precision"), CASES)
def test_they_load_as_the_merged_export_bit_by_bit(
    folder: Path, name: str, targets: str, precision: str, tmp_path: Path
) -> None:
    expected = loaded(merged(folder / name, tmp_path / "whole", targets, precision))
    found = loaded(written(folder / name, tmp_path / "apart", targets, precision))
    tensors = found.state_dict()
    assert tensors.keys() == expected.state_dict().keys()
    for key, tensor in expected.state_dict().items():
        assert tensors[key].dtype == tensor.dtype
        assert torch.equal(tensors[key], tensor), key
    assert all(parameter.requires_grad for parameter in found.parameters())
    assert found.training is expected.training
    assert torch.equal(logits(found), logits(expected))
    assert found.config.tie_word_embeddings == expected.config.tie_word_embeddings
    assert not torch.equal(logits(loaded(folder / name)), logits(expected)), "else nothing was learned"


@pytest.mark.parametrize("name", ["llama", "llama tied", "gpt2"])
def test_peft_loads_them_on_the_base_that_they_name(folder: Path, name: str, tmp_path: Path) -> None:
    directory = written(folder / name, tmp_path / "apart", "both")
    named = peft.PeftConfig.from_pretrained(str(directory)).base_model_name_or_path
    assert named == str(folder / name)
    base = AutoModelForCausalLM.from_pretrained(named, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, str(directory)).eval()
    torch.testing.assert_close(logits(model), logits(loaded(directory, torch.float32)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_slice_is_that_of_the_whole(folder: Path, name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    directory = written(folder / name, tmp_path / "apart", "all-linear")
    task = CausalLM.load(directory, CausalLM({"sequence_length": 16}).options)
    begun = start.described_by(directory, task)
    assert not isinstance(begun, str), begun
    assert begun.fill is not None
    for key, parameter in loaded(directory, torch.float32).named_parameters():
        count = parameter.numel()
        for first, end in ((0, count), (count // 3, count // 2 + 1), (count - 1, count)):
            out = torch.empty(end - first, dtype=dtype)
            begun.fill(key, first, out)
            expected = parameter.detach().view(-1)[first:end]
            torch.testing.assert_close(
                out, expected.to(dtype), rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-6
            )
    begun.close()


@pytest.mark.parametrize(
    ("name", "targets", "why"),
    [("llama tied", "head", "no weight of its own"), ("qwen3_moe", "all-linear", "its adapters have rank_pattern")],
)
def test_what_is_no_sum_by_slices_is_loaded_whole(
    folder: Path, name: str, targets: str, why: str, tmp_path: Path
) -> None:
    directory = written(folder / name, tmp_path / "apart", targets)
    begun = start.described_by(directory, CausalLM.load(directory, CausalLM({"sequence_length": 16}).options))
    assert isinstance(begun, str)
    assert re.search(why, begun)


def test_adapters_on_adapters_load_and_are_trained_further(folder: Path, tmp_path: Path) -> None:
    first = written(folder / "llama", tmp_path / "first", "all-linear")
    second = written(first, tmp_path / "second", "all-linear", seed=2)
    expected = adapters.merge(trained(first, "all-linear", 2)[1])
    assert torch.equal(logits(loaded(second)), logits(expected))
    assert all(parameter.requires_grad for parameter in loaded(second).parameters())
    begun = start.described_by(second, CausalLM.load(second, CausalLM({"sequence_length": 16}).options))
    assert not isinstance(begun, str), begun
    begun.materialise()
    torch.testing.assert_close(logits(begun.model), logits(expected), rtol=1e-4, atol=1e-4)


def test_the_head_of_a_classifier_is_that_which_was_trained(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    encoder = AutoModel.from_config(AutoConfig.for_model("bert", vocab_size=320, **sizes))
    encoder.save_pretrained(tmp_path / "base")  # it has no head
    classifier = partial(loading.load, AutoModelForSequenceClassification, dtype=None, may_lack_head=True)
    model, said = classifier(tmp_path / "base", config={"num_labels": 5})
    assert "random until trained" in said[0]
    live = add_lora(model, LoraSpec(rank=2, merge=False))
    with torch.no_grad():
        for parameter in live.parameters():
            parameter += 0.1 * parameter.requires_grad * torch.randn_like(parameter)
    (tmp_path / "apart").mkdir()
    apart.save(tmp_path / "apart", live, apart.base(tmp_path / "base", ""))
    apart.save_config(live, torch.float32, tmp_path / "apart")
    expected = logits(live.eval())
    found, said = classifier(tmp_path / "apart", config={})
    assert not any("random" in sentence for sentence in said)
    assert expected.shape == (2, 5)
    torch.testing.assert_close(logits(found), expected)
    assert all(parameter.requires_grad for parameter in found.parameters())


def test_a_base_that_is_gone_or_has_changed_is_refused(folder: Path, tmp_path: Path) -> None:
    base = shutil.copytree(folder / "llama", tmp_path / "base")
    directory = written(base, tmp_path / "apart", "all-linear")
    model_folder.check(directory, "it")
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(TaskError, match=r"adapters for the model in \S+base, which is not there"):
        loaded(directory)
    with pytest.raises(TrackingError, match=r"it: .*which is not there: put that back"):
        model_folder.check(directory, "it")
    base.symlink_to(tmp_path / "elsewhere")
    before = logits(loaded(directory))
    content = bytearray((base / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (base / "model.safetensors").write_bytes(content)
    with pytest.raises(TaskError, match="whose weights have changed since"):
        loaded(directory)
    content[-5] ^= 1
    (base / "model.safetensors").write_bytes(content)
    assert torch.equal(logits(loaded(directory)), before)


def test_a_base_of_the_hub_is_asked_for_at_its_commit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.use(tmp_path / "cache", monkeypatch)
    with pytest.raises(UserError, match=r"that of org/tiny is not known on this machine: leave merge out"):
        apart.check(torch.nn.Linear(1, 1), Path("org/tiny"))
    hub.keep(tmp_path / "cache", "org/tiny", folder / "llama")
    directory = written(folder / "llama", tmp_path / "apart", "all-linear")
    expected = logits(loaded(directory))
    assert apart.base(Path("org/tiny"), "") == adapters.Base("org/tiny", hub.COMMIT)
    adapters.Base("org/tiny", hub.COMMIT).write(directory)
    assert torch.equal(logits(loaded(directory)), expected)
    adapters.Base("org/tiny", "f" * 40).write(directory)
    with pytest.raises(TaskError, match=r"adapters for org/tiny at commit ffff\S+, which cannot be had"):
        loaded(directory)


def test_adapters_that_lack_a_tensor_or_have_another_one_are_refused(folder: Path, tmp_path: Path) -> None:
    directory = written(folder / "llama", tmp_path / "apart", "all-linear")
    tensors = load_file(directory / adapters.WEIGHTS)
    one = min(tensors)
    for wrong, said in (
        ({key: tensor for key, tensor in tensors.items() if key != one}, "is missing"),
        ({**tensors, one.replace("layers.0", "layers.1"): tensors[one].clone()}, "has no place"),
        ({**tensors, one: tensors[one][:1].clone()}, "cannot put the adapters"),
    ):
        save_file(wrong, directory / adapters.WEIGHTS)
        with pytest.raises(TaskError, match=said):
            loaded(directory)


def test_a_base_is_known_by_what_adapters_below_it_say(folder: Path, tmp_path: Path) -> None:
    directory = written(folder / "llama", tmp_path / "apart", "all-linear")
    before = weights_digest.of_folder(directory)
    assert lineage.weights_digest(directory) == before
    settings = json.loads((directory / adapters.CONFIG).read_text())
    (directory / adapters.CONFIG).write_text(json.dumps({**settings, "lora_alpha": 17}))
    assert weights_digest.of_folder(directory) != before


def spec(**model: Any) -> JobSpec:
    values = {"name": "x", "phase": "finetune", "model": model, "training": {"steps": 1}}
    values["data"] = {"train": "a.txt", "sequence_length": 16}
    return JobSpec.model_validate(values)


def test_they_may_be_started_from_and_served_but_not_by_vllm(folder: Path, tmp_path: Path) -> None:
    directory = written(folder / "llama", tmp_path / "apart", "all-linear")
    assert parents.find(spec(**{"from": str(directory)}), tmp_path) == directory
    model = {"model": str(directory)}
    (served,) = plan.resolve(ServeSpec.model_validate({"models": {"tiny": model}}))
    assert served.details["base"] == "llama"
    named = publish.base_of(directory, "models:/lm/3")
    assert named == manifest.BaseRef(reference="models:/lm/3", digest=lineage.weights_digest(folder / "llama"))
    assert publish.base_of(directory, str(folder / "llama")) == manifest.read(directory).base
    assert publish.base_of(folder / "llama", "models:/lm/3") is None
    said = "models.tiny.engine: vllm serves whole models, and .* holds adapters for .*llama: leave engine out"
    with pytest.raises(UserError, match=said):
        plan.resolve(ServeSpec.model_validate({"models": {"tiny": {**model, "engine": "vllm"}}}))


def test_there_has_to_be_a_base_and_the_choice_is_part_of_the_run() -> None:
    with pytest.raises(ValidationError, match=r"model\.lora\.merge"):
        JobSpec.model_validate(
            {
                "name": "x",
                "phase": "pretrain",
                "model": {"architecture": "llama", "lora": {"merge": False}},
                "data": {"train": "a.txt"},
                "training": {"steps": 1},
            }
        )
    digests = [spec(**{"from": "/m", "lora": lora}).digest() for lora in ({}, {"merge": True}, {"merge": False})]
    assert digests[0] == digests[1] != digests[2]


def test_running_statistics_are_refused_before_anything_is_learned() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1), torch.nn.BatchNorm2d(1))
    with pytest.raises(UserError, match="running statistics of BatchNorm2d change in the base itself"):
        apart.check(model, Path("/somewhere"))
