"""A base of few bits stands for nearly the weights that it was made of, and gives gradients to what lies before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.nn.functional import linear
from torchao.quantization import to_nf4

from cluster.errors import UserError
from jobs.plan import facts
from jobs.spec import JobSpec, LoraSpec
from jobs.tasks.causal_lm import CausalLM
from jobs.worker import held, start, zero
from jobs.worker.held import Held
from jobs.worker.lora import add_lora
from tests.support import tiny_models


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_nf4_takes_the_values_that_torchao_takes() -> None:
    weight = drawn(24, 128)
    exact = to_nf4(weight, 64, 1)  # with a scale of its own for each block's magnitude, which is then exact
    expected = exact.get_original_weight()
    found = Held(weight, None, "nf4").made(torch.float32)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    assert ((found - weight).abs() <= (expected - weight).abs() + 1e-2).all()


@pytest.mark.parametrize(("kind", "most", "share"), [("int8", 0.01, 0.27), ("nf4", 0.1, 0.15)])
@pytest.mark.parametrize("shape", [(24, 100), (3, 7), (1, 64)])
def test_bits_stand_for_nearly_the_same_weights(kind: Any, most: float, share: float, shape: tuple[int, int]) -> None:
    weight = drawn(*shape)
    layer = Held(weight, None, kind)
    assert (layer.made(torch.float32) - weight).norm() / weight.norm() < most
    if shape[1] == 100:
        assert layer.bits.nbytes + layer.scale.nbytes < share * 4 * weight.numel()
    assert torch.equal(Held(weight.clone(), None, kind).made(torch.float32), layer.made(torch.float32))
    assert held.size(*shape, kind) == layer.bits.nbytes + layer.scale.nbytes


def test_zeros_stay_zeros_and_rows_of_one_size_are_exact() -> None:
    for kind in ("int8", "nf4"):
        assert not Held(torch.zeros(4, 8), None, kind).made(torch.float32).any()  # type: ignore[arg-type]
        signs = drawn(4, 64).sign() * 3
        assert torch.allclose(Held(signs, None, kind).made(torch.float32), signs)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_product_and_its_gradient_are_those_of_the_made_weight(kind: Any) -> None:
    bias = torch.nn.Parameter(drawn(24), requires_grad=False)
    layer = Held(drawn(24, 100), bias, kind)
    x, other = (drawn(2, 5, 100).requires_grad_() for _ in range(2))
    y, expected = layer(x), linear(other, layer.made(torch.float32), bias)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad)


def test_its_bits_are_no_state_and_are_not_cast() -> None:
    layer = Held(drawn(8, 64), None, "nf4")
    assert layer.state_dict() == {}
    assert list(layer.parameters()) == []
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(drawn(2, 64)).dtype == torch.bfloat16
    assert layer(drawn(2, 64).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_all_linear_layers_but_the_head_are_held(kind: str) -> None:
    model = tiny_models.decoder(kind, spread=0.2, num_hidden_layers=1)
    tokens = torch.arange(12).view(2, 6)
    targets = ["q_proj"] if kind == "llama" else ["c_attn"]
    adapted = add_lora(model, LoraSpec.model_validate({"rank": 2, "target_modules": targets})).eval()
    planned = facts.of(adapted, "int8")
    with torch.no_grad():
        before = adapted(tokens).logits
        said = held.hold(adapted, None, "int8")
        after = adapted(tokens).logits
    assert (after - before).norm() / before.norm() < 0.02
    assert not torch.equal(after, before)
    layers = [module for module in adapted.modules() if isinstance(module, Held)]
    assert len(layers) == (7 if kind == "llama" else 4)
    assert said.startswith(f"the base is held in int8 while adapters are trained: {len(layers)} linear layers (1 ")
    assert type(adapted.get_output_embeddings()) is torch.nn.Linear
    assert facts.of(adapted) == planned, "what is held now was counted so before"
    assert planned.held_bytes == sum(layer.bits.nbytes + layer.scale.nbytes for layer in layers)


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(UserError, match="Conv2d has none that are frozen: leave base out"):
        held.hold(torch.nn.Conv2d(1, 1, 1), None, "nf4")
    with pytest.raises(UserError, match="Conv2d has none that are frozen: leave base out"):
        facts.of(torch.nn.Conv2d(1, 1, 1), "nf4")


def spec(stage: int = 1, **lora: Any) -> JobSpec:
    values = {"name": "x", "phase": "finetune", "data": {"train": "a.txt"}, "model": {"from": "/m", "lora": lora}}
    return JobSpec.model_validate({**values, "training": {"steps": 1, "deepspeed": {"zero_stage": stage}}})


def test_what_cannot_be_is_refused_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"(?s)model\.lora\.base.*needs `model\.lora\.merge: false`"):
        spec(base="nf4")
    with pytest.raises(ValidationError, match=r"(?s)zero_stage.*stage 3 divides weights.*take stage 2"):
        spec(stage=3, base="nf4", merge=False)
    found = spec(stage=2, base="nf4", merge=False)
    assert found.digest() != spec(stage=2, merge=False).digest()
    with pytest.raises(UserError, match=r"nf4 is held whole by every worker, and training\.deepspeed asks for stage 3"):
        zero.check_base(found.model.lora, {"zero_optimization": {"stage": 3}})
    zero.check_base(found.model.lora, {"zero_optimization": {"stage": 2}})


class Comparing(CausalLM):
    """A task that compares with what the model was."""

    def refers(self) -> bool:
        return True


@pytest.mark.parametrize("task_class", [CausalLM, Comparing])
def test_what_is_compared_with_the_model_as_it_is_does_not_begin_as_another(task_class: Any, tmp_path: Path) -> None:
    parent = tiny_models.language_model(tmp_path / "m")
    values = {"name": "x", "phase": "finetune", "data": {"train": "a.txt"}, "training": {"steps": 1}}
    lora = {"merge": False, "base": "nf4"}
    job = JobSpec.model_validate({**values, "model": {"from": str(parent), "lora": lora}})
    task = task_class.load(parent, CausalLM({"sequence_length": 16}).options)
    if task.refers():
        with pytest.raises(UserError, match="would begin as another one, in nf4: leave base out"):
            start.begin(job, task, parent)
        return
    begun = start.begin_whole(job, task, parent)
    assert begun.said[1].startswith("the base is held in nf4 while adapters are trained: 14 linear layers")
    assert not any(parameter.is_meta for parameter in begun.model.parameters())
    assert {name.rpartition(".")[2] for name, p in begun.model.named_parameters() if p.requires_grad} == {"weight"}
    begun.close()
