"""Muon: its step against torch's, which matrices it trains, and what checkpoints know of it."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cluster import specfile
from cluster.errors import UserError
from jobs.spec import JobSpec, LoraSpec, TrainingSpec
from jobs.worker import muon, optimizers
from jobs.worker.lora import add_lora
from jobs.worker.muon import Matrix, MuonAndAdamW

CPU = torch.device("cpu")
TRAINING = TrainingSpec.model_validate({"steps": 1, "learning_rate": 0.01, "optimizer": "muon"})
SMALL = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50,
}  # fmt: skip


BASE = "{name: x, phase: pretrain, model: {architecture: llama}, data: {train: a.txt}, training: {steps: 5}}"
BEFORE = "d228504ea56aa2311a39754d0dc64bf91eb45a9206acfa8bff31c2b4509b2861"
"""The digest of that spec at 1f963e2, when AdamW was the only one."""


def load(*overrides: str) -> JobSpec:
    return specfile.loads(BASE, JobSpec, overrides)


def stepped(optimizer: torch.optim.Optimizer, weight: torch.nn.Parameter) -> torch.Tensor:
    """Take three steps of a weight (rows, columns) whose gradients the seed decides."""
    torch.manual_seed(1)
    for _ in range(3):
        weight.grad = torch.randn_like(weight)
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16)])
def test_its_step_is_that_of_torchs_muon(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    begun = torch.randn(shape)
    theirs, ours = torch.nn.Parameter(begun.clone()), torch.nn.Parameter(begun.clone())
    group = {"params": [ours], "weight_decay": 0.1, "matrices": True}
    optimizer = MuonAndAdamW([group], torch.bfloat16, CPU, lr=0.01)
    optimizer.lay_out({ours: [Matrix(*shape, 0, (ours.numel(),))]})
    torchs = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    moved = stepped(torchs, theirs) - begun
    # torch computes in bf16, as is asked for here; orders of sums differ, to 2^-8 of each element's size.
    assert float((stepped(optimizer, ours) - theirs.detach()).norm() / moved.norm()) < 0.02
    exact = MuonAndAdamW(
        [{**group, "params": [again := torch.nn.Parameter(begun.clone())]}], torch.float32, CPU, lr=0.01
    )
    exact.lay_out({again: [Matrix(*shape, 0, (again.numel(),))]})
    assert 0 < float((stepped(exact, again) - theirs.detach()).norm() / moved.norm()) < 0.05


def test_singular_values_come_near_one_and_vectors_stay() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(12, 30)
    found = muon.orthogonal(matrix, torch.float32)
    assert 0.6 < float(torch.linalg.svdvals(found).min()) <= float(torch.linalg.svdvals(found).max()) < 1.3
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    rotated = left.mT @ found @ right.mT
    assert float((rotated - torch.diag(rotated.diagonal())).abs().max()) < 1e-4
    assert torch.equal(muon.orthogonal(matrix.mT, torch.float32), found.mT)
    assert float(muon.orthogonal(torch.zeros(3, 4), torch.float32).abs().max()) == 0


def test_matrices_are_dealt_out_evenly() -> None:
    flats = [torch.zeros(1), torch.zeros(1)]
    inside = [Matrix(2, size, 0, (size, size)) for size in (1, 5, 3)]
    found = muon.dealt({flats[0]: inside, flats[1]: inside[:1]})
    assert [(each.columns, each.owner) for each in found[flats[0]]] == [(5, 0), (3, 1), (1, 0)]
    assert [each.owner for each in found[flats[1]]] == [1], "so that small groups are not all the first rank's"


def test_of_a_language_model_it_trains_the_hidden_layers() -> None:
    for tied in (False, True):
        model = LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=tied))
        found = optimizers.matrices_of(model)
        assert len(found) == 2 * 7
        assert not [name for name in found if "embed" in name or "lm_head" in name or "norm" in name]
    (said,) = optimizers.said(model, found)
    assert "Muon trains 14 matrices (2 down_proj, 2 gate_proj, 2 k_proj, " in said
    assert f"AdamW the other 6 parameters with {50 * 16 + 5 * 16}" in said
    adapted = add_lora(model, LoraSpec())
    assert len(optimizers.matrices_of(adapted)) == 2 * 7 * 2, "adapters alone: the rest is frozen"


def test_a_classifiers_head_is_not_its_own_and_gpt2s_products_are() -> None:
    from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=8)
    kinds = {name.split(".")[-2] for name in optimizers.matrices_of(GPT2LMHeadModel(config))}
    assert kinds == {"c_attn", "c_proj", "c_fc"}
    assert optimizers.matrices_of(GPT2ForSequenceClassification(config)) == optimizers.matrices_of(
        GPT2LMHeadModel(config)
    )


def test_of_a_network_of_ones_own_the_last_layer_is_the_head() -> None:
    layers = (torch.nn.Linear(4, 8), torch.nn.Conv2d(2, 2, 3), torch.nn.LSTM(8, 8), torch.nn.Linear(8, 2))
    assert optimizers.matrices_of(torch.nn.Sequential(*layers)) == {"0.weight", "2.weight_ih_l0", "2.weight_hh_l0"}
    with pytest.raises(UserError, match=r"training\.optimizer: muon trains the matrices .* Linear has none"):
        optimizers.matrices_of(torch.nn.Linear(4, 2))


def test_groups_decay_as_they_should() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
    groups = list(optimizers.parameter_groups(model.named_parameters(), 0.1, {"0.weight", "1.weight"}))
    assert [(len(g["params"]), g["weight_decay"], g.get("matrices", False)) for g in groups] == [
        (2, 0.1, True), (1, 0.1, False), (3, 0.0, False),
    ]  # fmt: skip
    (first, _) = optimizers.parameter_groups(model.named_parameters(), 0.1)
    assert (len(first["params"]), "matrices" in first) == (3, False)


def test_runs_of_adamw_keep_their_names() -> None:
    """A run's folder has its spec's digest in its name: those from before there was a choice go on."""
    assert load().digest() == load("training.optimizer=adamw").digest() == BEFORE
    assert load("training.optimizer=muon").digest() != BEFORE
