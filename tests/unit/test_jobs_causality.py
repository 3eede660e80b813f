"""A model that sees the tokens it is to predict is found by running it, whatever its architecture is called."""

import pytest
import torch

from jobs.tasks import TaskError, causality, get

ENCODER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CAUSAL = {
    "llama": ENCODER,
    "mamba": {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4},
    "mixtral": {**ENCODER, "num_key_value_heads": 2, "num_local_experts": 4},
    "bert": {**ENCODER, "is_decoder": True},
}


@pytest.fixture(scope="module")
def lm():
    task = get("causal-lm")({"sequence_length": 32, "tokenizer": {"train": "bpe", "vocab_size": 300}})
    task.fit(task.observe([{"text": "the quick brown fox jumps over the lazy dog; " * 30}]))
    return task


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("architecture", "config"), CAUSAL.items())
def test_a_causal_model_is_none_of_them(lm, architecture, config, dtype):
    model = lm.build(architecture, config).to(dtype)
    before = torch.random.get_rng_state()
    assert not causality.sees_ahead(model, 32)
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["bert", "roberta", "electra"])
def test_an_encoder_is_refused_before_it_learns_to_copy(lm, architecture, dtype):
    model = lm.build(architecture, {**ENCODER, "num_hidden_layers": 1}).to(dtype)
    with pytest.raises(TaskError, match=r"sees the tokens that it is to predict.*is_decoder: true"):
        lm.prepare_model(model, {"input_ids"})
