"""Attention within documents makes what a mask of S x S makes, and models that cannot be told so keep their mask."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from jobs.spec import LoraSpec
from jobs.tasks import attention_in_blocks, document_attention, get, packed_attention, packing
from jobs.worker.lora import add_lora
from jobs.worker.torch_internals import TorchDispatchMode
from tests.support import tiny_models

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
GATED = {**SHAPE, "intermediate_size": 48, "num_key_value_heads": 2}
DOCUMENTS = torch.tensor([[0] * 20 + [1] * 5 + [2] * 25, [0] * 1 + [1] * 49], dtype=torch.int32)
ENDS = torch.tensor([[20, 25, 50, 50], [1, 50, 50, 50]], dtype=torch.int32)
"""Of DOCUMENTS."""


def inputs(groups: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Return queries (2, 4, 50, 8), as models have them, keys and values (2, G, 50, 8)."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(2, 50, heads, 8, generator=generator).to(dtype) for heads in (4, groups, groups)]
    return [tensor.transpose(1, 2).requires_grad_() for tensor in drawn]


def masked(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
    """Return what a mask makes of them, in fp64."""
    seen = (DOCUMENTS[:, :, None] == DOCUMENTS[:, None, :]) & torch.ones(50, 50).tril().bool()
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, 1).double() for tensor in (key, value))
    scores = query.double() @ key.mT * (scale or query.shape[-1] ** -0.5)
    return scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1) @ value


@pytest.mark.parametrize(("groups", "scale"), [(4, None), (2, 0.3), (1, None)])
def test_documents_attend_as_under_a_mask_forward_and_backward(groups: int, scale: float | None) -> None:
    given = inputs(groups)
    made, expected = document_attention.attend(*given, ENDS, scale=scale), masked(*given, scale)
    weight = torch.randn(made.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(made.double(), expected, rtol=0, atol=1e-6)
    found, wanted = (torch.autograd.grad((each * weight).sum(), given) for each in (made, expected))
    for gradient, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, right, rtol=0, atol=3e-6)


def test_in_bf16_they_do_up_to_rounding() -> None:
    given = inputs(2, torch.bfloat16)
    made = document_attention.attend(*given, ENDS)
    made.float().sum().backward()
    torch.testing.assert_close(made.double(), masked(*given, None), rtol=0, atol=0.03)
    assert all(tensor.grad is not None and torch.isfinite(tensor.grad).all() for tensor in given)


def test_a_row_of_one_document_is_causal() -> None:
    given = inputs(2)
    one = document_attention.attend(*given, torch.full((2, 1), 50, dtype=torch.int32))
    plain = torch.nn.functional.scaled_dot_product_attention(
        given[0], *(tensor.repeat_interleave(2, 1) for tensor in given[1:]), is_causal=True
    )
    torch.testing.assert_close(one, plain)


def test_values_of_another_width_are_attended_to_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_in_blocks, "BLOCK", 7)
    query, key, value = inputs(2)
    wide = torch.cat([value, value.flip(-1)], dim=-1).detach().requires_grad_()
    made, expected = document_attention.attend(query, key, wide, ENDS), masked(query, key, wide, None)
    torch.testing.assert_close(made.double(), expected, rtol=0, atol=1e-6)
    weight = torch.randn(made.shape, generator=torch.Generator().manual_seed(1))
    found, wanted = (torch.autograd.grad((each * weight).sum(), (query, key, wide)) for each in (made, expected))
    for gradient, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, right, rtol=0, atol=3e-6)


def test_autocast_of_the_forward_pass_does_not_reach_its_sums() -> None:
    """It is over when the backward pass makes them again."""
    query, key, value = inputs(2, torch.bfloat16)
    wide = torch.cat([value, value], dim=-1)
    with torch.no_grad():
        given = (query, *(each.repeat_interleave(2, 1) for each in (key, wide)), ENDS, None, 0.0, None)
        alone = document_attention.ON_CPU(*given)
        with torch.autocast("cpu", torch.bfloat16):
            under = document_attention.ON_CPU(*given)
    assert all(map(torch.equal, alone, under))


def dropped(share: float, ends: torch.Tensor = ENDS, seed: int = 0, **kinds: Any) -> torch.Tensor:
    """Return what is made of inputs; values are ones, so that it is the sum of the weights that are left."""
    query, key, value = inputs(4)
    torch.manual_seed(seed)
    return document_attention.attend(query, key, torch.ones_like(value), ends, dropout=share, **kinds)[..., 0]


def test_weights_are_dropped_with_their_share_and_the_others_grow() -> None:
    left = torch.stack([dropped(0.3, seed=seed) for seed in range(200)])
    assert left.mean().item() == pytest.approx(1.0, abs=0.01)
    alone = left[:, 0, :, 0]  # the first token sees itself only
    assert alone.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert (alone == 0).float().mean().item() == pytest.approx(0.3, abs=0.06)
    assert not torch.equal(dropped(0.3, seed=0), dropped(0.3, seed=1))
    assert torch.equal(dropped(0.3, seed=7), dropped(0.3, seed=7)), "a run that goes on draws the same"
    whole = dropped(0.3, torch.full((2, 1), 50, dtype=torch.int32))
    assert (whole != 1).any(), "rows of one document too"


def test_the_gradient_under_dropout_is_that_of_what_was_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_in_blocks, "BLOCK", 3)
    given = [tensor.detach()[:, :1, :9, :3].double().requires_grad_() for tensor in inputs(2)]
    ends, seed = torch.tensor([[7, 9], [1, 9]], dtype=torch.int32), torch.tensor([3])
    assert torch.autograd.gradcheck(lambda *qkv: document_attention.ON_CPU(*qkv, ends, 0.3, 0.4, seed)[0], given)


def test_documents_end_where_positions_restart_and_rows_do() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1], [3, 4, 0, 0, 1]])
    ends = document_attention.ends_of(positions)
    assert ends.tolist() == [[3, 5, 5, 5], [2, 3, 5, 5]], "as many as a power of two"
    assert document_attention.bounds(ends, 5).tolist() == [0, 3, 5, 5, 5, 7, 8, 10, 10]
    assert document_attention.ends_of(torch.arange(4).expand(3, 4)).tolist() == [[4]] * 3


USED = {
    "llama": GATED,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "attn_pdrop": 0.0, "resid_pdrop": 0.0,
             "embd_pdrop": 0.0},
    "qwen3_moe": {**GATED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    "mistral": {**GATED, "sliding_window": 64},
}  # fmt: skip
NOT = {
    "mistral": {**GATED, "sliding_window": 8},
    "gemma2": {**GATED, "head_dim": 8},
}


@pytest.fixture(scope="module")
def task() -> Any:
    task = get("causal-lm")({"sequence_length": 40, "documents": "separate"})
    task.tokenizer = tiny_models.tokenizer()
    return task


def rows() -> dict[str, np.ndarray]:
    """Return packed rows of 41 tokens."""
    generator = np.random.default_rng(0)
    pieces = [generator.integers(0, 64, size).tolist() for size in (20, 11, 9, 30, 7, 25, 12)]
    return packing.pack([(ids, [-100, *ids[1:]]) for ids in pieces], 41, 0)


@pytest.mark.parametrize(
    ("kind", "config", "used"), [*((k, c, True) for k, c in USED.items()), *((k, c, False) for k, c in NOT.items())]
)
def test_losses_and_gradients_are_those_with_a_mask(task: Any, kind: str, config: dict[str, Any], used: bool) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config))
    batch = task.collate(rows())
    expected, _ = task.loss(model, batch)
    before = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
    state = torch.random.get_rng_state()
    task.prepare_model(model, rows().keys())
    assert packed_attention.is_used(model) == used
    assert torch.equal(torch.random.get_rng_state(), state)
    found, _ = task.loss(model, task.collate(rows()))
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    for gradient, right in zip(
        torch.autograd.grad(found, list(model.parameters()), allow_unused=True), before, strict=True
    ):
        if right is not None:
            assert float((gradient - right).norm()) <= 1e-5 * float(right.norm()) + 1e-6


DROPPING = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "attn_pdrop": 0.1}


@pytest.mark.parametrize(("kind", "config"), [("llama", GATED), ("gpt2", DROPPING)])
def test_no_mask_is_made_of_packed_rows(task: Any, kind: str, config: dict[str, Any]) -> None:
    """A mask of these rows, (1, 1, 40, 40), or scores of such a size, would be seen."""

    class Largest(TorchDispatchMode):
        square = False

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            for each in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(each, torch.Tensor) and each.shape[-2:] == (40, 40):
                    self.square = True
            return out

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config)).train()
    with Largest() as seen:
        task.loss(model, task.collate(rows()))[0].backward()
    assert seen.square, "the mask of transformers is seen"
    task.prepare_model(model, rows().keys())
    batch = task.collate(rows())
    assert packed_attention.ENDS in batch, "found where batches are made"
    with Largest() as seen:
        task.loss(model, batch)[0].backward()
    assert not seen.square


def test_a_compiler_sees_one_graph_of_all_packed_rows(task: Any) -> None:
    """Whatever documents are in them: what a compiler would look at, it would compile again for other rows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **DROPPING)).train()
    task.prepare_model(model, rows().keys())
    graphs: list[Any] = []

    def counted(graph: Any, examples: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=counted, fullgraph=True)
    first = rows()
    other = {name: column[::-1].copy() for name, column in first.items()}
    for given in (first, other):
        batch = task.collate(given)
        found, expected = (_learned(task, each, model, batch) for each in (compiled, model))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert len(graphs) == 1


def _learned(task: Any, run: Any, model: Any, batch: Any) -> list[torch.Tensor]:
    """Return a batch's loss and what is learned of it, with the same numbers drawn."""
    torch.manual_seed(1)
    loss = task.loss(run, batch)[0]
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def test_models_with_adapters_attend_so_too(task: Any) -> None:
    torch.manual_seed(0)
    model = add_lora(AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **GATED)), LoraSpec())
    expected, _ = task.loss(model, task.collate(rows()))
    task.prepare_model(model, rows().keys())
    assert packed_attention.is_used(model)
    assert task.loss(model, task.collate(rows()))[0].item() == pytest.approx(expected.item(), rel=1e-6)
