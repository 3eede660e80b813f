"""A mixture's experts are kept equally busy where the config says so, as transformers does it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from jobs.tasks import IGNORED, TaskError, balance
from jobs.tasks.causal_lm import CausalLM
from tests.support.tiny_models import GROUPED, SIZES

MIXTURE = {**SIZES, **GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5}


def mixture(**config) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **MIXTURE, **config))


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(1))
    labels = ids[:, 1:].clone()
    labels[0, :3] = IGNORED
    return {"input_ids": ids[:, :-1], "labels": labels}


def mean_loss(model: torch.nn.Module) -> float:
    task = CausalLM({"sequence_length": 8})
    task.prepare_model(model, set())
    total, targets = task.loss(model, batch())
    return float(total / targets)


def test_the_loss_is_what_transformers_makes_of_it() -> None:
    model, rows = mixture(output_router_logits=True), batch()
    whole = torch.cat([torch.full((2, 1), IGNORED), rows["labels"]], 1)  # transformers shifts
    ids = torch.cat([rows["input_ids"], torch.full((2, 1), 3)], 1)
    with torch.no_grad():
        output = model(input_ids=rows["input_ids"], use_cache=False)
        plain = torch.nn.functional.cross_entropy(
            output.logits.flatten(0, 1), rows["labels"].flatten(), ignore_index=IGNORED
        )
        theirs = model(input_ids=ids[:, :-1], shift_labels=rows["labels"], labels=whole[:, 1:], use_cache=False).loss
        ours = mean_loss(model)
    assert ours == pytest.approx(float(theirs), rel=1e-5)
    assert ours > float(plain) + 0.5, "the balancing loss is at least 1 times its coefficient"


def test_without_the_switch_it_is_left_out_and_said() -> None:
    switched, plain = mixture(output_router_logits=True), mixture()
    for model in (switched, plain):
        assert CausalLM({"sequence_length": 8}).prepare_model(model.eval(), set()) == []  # it is only measured
        model.train()
    with torch.no_grad():
        assert mean_loss(plain) < mean_loss(switched) - 0.5
    task = CausalLM({"sequence_length": 8})
    assert task.prepare_model(plain, set())[0].startswith("the experts are trained without a loss that keeps them")
    with_it = f"the training loss includes {MIXTURE['router_aux_loss_coef']} times a loss that keeps the experts"
    assert task.prepare_model(switched, set())[0].startswith(with_it)


def test_the_router_learns_from_it() -> None:
    model = mixture(output_router_logits=True)
    task = CausalLM({"sequence_length": 8})
    task.prepare_model(model, set())
    task.loss(model, batch())[0].backward()
    with_it = [p.grad.clone() for name, p in model.named_parameters() if "gate" in name and p.dim() == 2]
    model.zero_grad()
    model.config.router_aux_loss_coef = 0.0
    task.loss(model, batch())[0].backward()
    without = [p.grad for name, p in model.named_parameters() if "gate" in name and p.dim() == 2]
    assert any(not torch.allclose(a, b) for a, b in zip(with_it, without, strict=True))


def test_an_architecture_without_such_a_loss_refuses_the_switch() -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model("llama", **SIZES, **GROUPED, output_router_logits=True)
    with pytest.raises(TaskError, match="computes no balancing loss"):
        balance.added(config, SimpleNamespace(logits=None))


def test_a_dense_model_has_nothing_to_say() -> None:
    from transformers import AutoConfig

    assert balance.remark(AutoConfig.for_model("llama", **SIZES, **GROUPED)) is None
