"""Rows that two ranks share, with real engines, against plain PyTorch in one process: losses, gradients, measures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

from cluster.errors import UserError
from jobs.data import batches
from jobs.data.prepare import prepare, rows_of
from jobs.tasks.causal_lm import CausalLM
from jobs.worker import evaluate, sequence, start
from jobs.worker.optimizers import parameter_groups
from jobs.worker.schedules import learning_rate
from tests.support import shared_ranks, tiny_models, two_ranks

CASES = ("0,packed,2,1", "1,packed,1,2,compiled", "2,windows,2,1", "3,packed,2,2")
"""Stage, data, and ranks that share a row, at first and once the run goes on."""
STEPS, ROWS = 3, 3
CLOSE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every case leaves."""
    folder = tmp_path_factory.mktemp("shared")
    tiny_models.tokenizer().save_pretrained(folder / "tokenizer")
    texts = [text * (1 + at % 3) for at, text in enumerate(tiny_models.TEXT * 12)]
    (folder / "x.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    for name, documents, heads in (("packed", "separate", 2), ("windows", "together", 1)):
        values = {
            "name": "x",
            "phase": "pretrain",
            "task": {"name": "causal-lm", "documents": documents, "sequence_length": 45}
            | {"tokenizer": {"from": str(folder / "tokenizer")}},
            "model": {"architecture": "llama"}
            | {"config": sizes | {"num_attention_heads": 4, "num_key_value_heads": heads, "initializer_range": 0.2}},
            "data": {"train": "x.jsonl", "eval_fraction": 0.2},
            "training": {"steps": STEPS, "global_batch_size": ROWS, "micro_batch_size": 1, "precision": "fp32"}
            | {"learning_rate": 0.01, "clip": 0.5, "gradient_checkpointing": name == "windows"},
        }
        (folder / f"{name}.json").write_text(json.dumps(values))
    two_ranks.run("shared_ranks", folder, CASES)
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, list[dict[str, float]]]:
    """What one process makes of each data set, without engines: loss and gradient norm of each step, evaluations."""
    return {data: list(_alone(folder, data)) for data in ("packed", "windows")}


def _alone(folder: Path, data: str):
    spec = shared_ranks.spec_of(folder, data)
    prepared = prepare(spec, folder, folder / f"{data}-alone", parent=None, on_progress=lambda *_: None)
    task, rows, training = prepared.task(spec), rows_of(prepared, prepared.train_files), spec.training
    model = start.begin_whole(spec, task, None).model
    start.look(spec, task, model, rows.columns)
    groups = parameter_groups(model.named_parameters(), training.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=training.betas, eps=training.epsilon)
    measured = rows_of(prepared, prepared.eval_files)
    how = {"limit": None, "seed": 0, "micro_batch": 4, "device": torch.device("cpu")}
    for step in range(STEPS):
        evaluation = task.summarise(evaluate.measure(task, model, measured, **how))
        chosen = batches.Order(len(rows), training.seed).take(step * ROWS, ROWS)
        total, targets = task.loss(model, task.collate(rows.take(chosen)))
        optimizer.zero_grad()
        (total / targets).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(training, step, STEPS)
        optimizer.step()
        yield {"loss": (total / targets).item(), "gradient_norm": norm.item(), "eval_loss": evaluation["loss"]}
    yield {"eval_loss": task.summarise(evaluate.measure(task, model, measured, **how))["loss"]}


def records(folder: Path, case: str) -> list[dict[str, float]]:
    lines = (folder / case / "run" / "spool" / "rank-0.jsonl").read_text().splitlines()
    return [json.loads(line)["metrics"] for line in lines]


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_one_rank(folder: Path, alone: dict, case: str) -> None:
    steps = [each for each in records(folder, case) if "loss" in each]
    expected = alone[case.split(",")[1]][:STEPS]
    assert len(steps) == STEPS, "the run went on where it had stopped"
    for name in ("loss", "gradient_norm"):
        assert [step[name] for step in steps] == pytest.approx([step[name] for step in expected], rel=CLOSE)
    assert min(step["gradient_norm"] for step in expected) > 0.5, "else nothing is clipped"


@pytest.mark.parametrize("case", CASES)
def test_evaluations_are_those_of_one_rank_and_what_is_exported_evaluates_so(
    folder: Path, alone: dict, case: str
) -> None:
    """The ranks have raised where the loss of the exported files was another one."""
    found = [each["eval_loss"] for each in records(folder, case) if "eval_loss" in each]
    expected = alone[case.split(",")[1]]
    assert found == pytest.approx([expected[0]["eval_loss"], expected[-1]["eval_loss"]], rel=CLOSE)
    assert (folder / case / "run" / "model" / "model.safetensors").is_file()
    assert "tandem" not in (folder / case / "run" / "model" / "config.json").read_text()


@pytest.mark.parametrize("case", CASES)
def test_flops_do_not_depend_on_who_shares_rows(folder: Path, case: str) -> None:
    """Rows of 45 tokens are padded by one where two ranks share them."""
    steps = [each for each in records(folder, case) if "loss" in each]
    flops = [step["model_flops_per_second"] * step["step_time_s"] for step in steps]
    assert flops == pytest.approx([flops[0]] * STEPS, rel=0.05)


def test_packed_rows_hold_documents_that_begin_within_either_part(folder: Path) -> None:
    spec = shared_ranks.spec_of(folder, "packed")
    prepared = prepare(spec, folder, folder / "packed-alone", parent=None, on_progress=lambda *_: None)
    rows = rows_of(prepared, prepared.train_files)
    first = batches.Order(len(rows), 0).take(0, STEPS * ROWS)
    begins = np.nonzero(rows.take(first)["position_ids"][:, 1:-1] == 0)[1] + 1
    assert begins.min() < 23 <= begins.max()


SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64, "pad_token_id": 0}
GATED = {**SHAPE, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
KNOWN = {
    "llama": GATED,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64},
    "qwen3_moe": {**GATED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}
REFUSED = {
    "gemma2": (GATED, "its scores take softcap"),
    "lfm2": ({**GATED, "layer_types": ["conv", "full_attention"]}, "1 of its 2 layers do not attend"),
    "bloom": ({"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64}, "workers cannot share rows of Bloom"),
}


@pytest.fixture
def task() -> Iterator[CausalLM]:
    """A task among ranks of whom there is one, which has all of a row: what is asked of a model is the same."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield CausalLM({"sequence_length": 12})
    dist.destroy_process_group()


def shared(task: CausalLM, kind: str, config: dict, *, packed: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config)).train()
    ids = torch.zeros(1, 12, dtype=torch.int64)
    batch = {"input_ids": ids, "labels": ids, **({"position_ids": ids} if packed else {})}
    sequence.share(task, model, sequence.place(0, 1, 1), batch)
    return model


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("kind", "config"), KNOWN.items())
def test_models_are_found_to_make_the_same_of_parts(task: CausalLM, kind: str, config: dict, packed: bool) -> None:
    assert shared(task, kind, config, packed=packed).training


@pytest.mark.parametrize(("kind", "config", "said"), [(kind, *about) for kind, about in REFUSED.items()])
def test_models_that_cannot_are_refused_when_they_are_run(task: CausalLM, kind: str, config: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        shared(task, kind, config, packed=False)
