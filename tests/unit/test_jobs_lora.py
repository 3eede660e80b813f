"""Adapters go where the spec says, and nowhere else without a word."""

from __future__ import annotations

import pytest
import torch

from cluster.errors import UserError
from jobs.spec import LoraSpec
from jobs.worker.lora import add_lora, described
from tests.support import tiny_models

EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "decoder_sparse_step": 1}


def decoder_with(kind: str, targets: list[str] | str, **changes: object) -> torch.nn.Module:
    lora = LoraSpec.model_validate({"rank": 2, "target_modules": targets})
    return add_lora(tiny_models.decoder(kind, num_hidden_layers=1, **changes), lora)


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["q_proj", "w_proj"], "has no layer named w_proj; its linear layers: q_proj, k_proj, v_proj, o_proj"),
        (["Q_PROJ", "q_proj"], "has no layer named Q_PROJ"),
        (["layers.7.self_attn.q_proj", "q_proj"], "has no layer named layers.7.self_attn.q_proj"),
        ([".*_proj"], "not found in the base model"),
        (["mlp"], "Target module LlamaMLP takes no adapter; linear layers of LlamaForCausalLM: q_proj"),
    ],
)
def test_a_name_without_a_layer_is_refused(targets, said):
    with pytest.raises(UserError, match=f"model.lora.target_modules: .*{said}"):
        decoder_with("llama", targets)


def test_what_is_adapted_is_said():
    said = described(decoder_with("llama", ["q_proj", "self_attn.k_proj", "model.layers.0.mlp.up_proj"]))
    assert said.startswith("adapters on 3 layers (1 k_proj, 1 q_proj, 1 up_proj): 768 of ")


def test_experts_that_share_a_parameter_are_adapted_by_their_old_names():
    said = described(decoder_with("qwen3_moe", ["q_proj", "gate_proj", "up_proj", "down_proj"], **EXPERTS))
    assert said.startswith("adapters on 3 layers (1 down_proj, 1 gate_up_proj, 1 q_proj): ")


@pytest.mark.parametrize("targets", [["query"], "all-linear"])
def test_the_head_of_a_classifier_is_trained_whole(targets):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("bert", vocab_size=8, **sizes))
    lora = LoraSpec.model_validate({"rank": 2, "target_modules": targets})
    adapted = add_lora(model, lora)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert [name for name in trained if "lora" not in name] == [
        f"base_model.model.classifier.modules_to_save.default.{part}" for part in ("weight", "bias")
    ]
    assert ", classifier whole: " in described(adapted)
