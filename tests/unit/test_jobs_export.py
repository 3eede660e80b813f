"""The model that leaves is the model that was trained: exported, loaded from the files and measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from jobs.data.prepare import Prepared, prepare, rows_of
from jobs.spec import JobSpec, LoraSpec
from jobs.tasks import Task
from jobs.tasks.causal_lm import CausalLM
from jobs.worker import proof
from jobs.worker.evaluate import measure
from jobs.worker.export import WrongExport, check_loss, export, save
from jobs.worker.lora import add_lora
from tests.support import tiny_models

CPU = torch.device("cpu")


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}


@pytest.fixture(scope="module", params=["llama tied", "llama", "gpt2", "qwen3_moe"])
def parent(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model to start from; gpt2's is tied and has Conv1D layers, qwen3_moe's has experts in one parameter."""
    kind, tied = request.param.split()[0], request.param != "llama"
    fast = tiny_models.tokenizer()
    changes = {"vocab_size": len(fast), "tie_word_embeddings": tied, "num_hidden_layers": 1}
    changes |= EXPERTS if kind == "qwen3_moe" else {}
    return tiny_models.export(
        tmp_path_factory.mktemp("models") / kind, fast, tiny_models.decoder(kind, spread=0.2, **changes)
    )


@cache
def prepared_for(parent: Path) -> tuple[JobSpec, Prepared]:
    lines = [json.dumps({"text": text}) for text in tiny_models.TEXT * 12]
    (parent.parent / "held-out.jsonl").write_text("\n".join(lines))
    values = {"name": "x", "phase": "evaluate", "model": {"from": str(parent)}}
    spec = JobSpec.model_validate({**values, "data": {"eval": "held-out.jsonl", "sequence_length": 32}})
    return spec, prepare(spec, parent.parent, parent.parent / "s", parent=parent, on_progress=lambda *_: None)


def trained(parent: Path, lora: LoraSpec | None) -> tuple[Task, dict[str, torch.Tensor], proof.Measured]:
    """Return the task, weights that differ from the parent's, and what the live model's loss is."""
    spec, prepared = prepared_for(parent)
    task, rows = prepared.task(spec), rows_of(prepared, prepared.eval_files)
    model = task.load_model(parent, torch.float32)
    torch.manual_seed(1)
    model = add_lora(model, lora) if lora else model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter) * (1 if "lora" in name else 0.1)
    sums = measure(task, model, rows, limit=8, seed=0, micro_batch=4, device=CPU)
    loss = task.summarise(sums)["loss"]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return task, weights, proof.Measured(loss, rows, 8, 0, 4, "the held-out rows")


def exported(
    to: Path, parent: Path, lora: LoraSpec | None, precision: Any, task_class: type[Task] | None = None
) -> Path:
    """Export and check it as a worker does."""
    task, weights, live = trained(parent, lora)
    task = task_class.load(parent, task.options) if task_class else task

    def check(written: Path) -> None:
        proof.of_files(written, live, task, precision, CPU)

    fresh = lambda: CausalLM.load(parent, task.options).load_model(parent, torch.float32)  # noqa: E731
    export(to, task, weights, fresh, precision, lora, check)
    return to


def loras(parent: Path) -> dict[str, LoraSpec | None]:
    """Return what may be adapted, by the names that the parent's architecture has."""
    of_gpt2 = json.loads((parent / "config.json").read_text())["model_type"] == "gpt2"
    embedding, attention = ("wte", "c_attn") if of_gpt2 else ("embed_tokens", "q_proj")
    return {
        "none": None,
        "all-linear": LoraSpec(rank=4),
        "embedding": LoraSpec(rank=4, target_modules=[embedding]),
        "head": LoraSpec(rank=4, target_modules=["lm_head"]),
        "both": LoraSpec(rank=4, target_modules=[attention, embedding, "lm_head"]),
    }


KINDS = ("none", "all-linear", "embedding", "head", "both")


@pytest.mark.parametrize(
    ("adapters", "precision"), [*((name, "fp32") for name in KINDS), ("none", "bf16"), ("both", "bf16")]
)
def test_the_files_have_the_loss_of_the_trained_model(parent, adapters, precision, tmp_path):
    exported(tmp_path / "model", parent, loras(parent)[adapters], precision)  # raises where they have not


def test_the_adapters_alone_give_the_same_loss_on_the_parent(parent, tmp_path):
    import peft

    lora = loras(parent)["both"]
    task, _, live = trained(parent, lora)
    directory = exported(tmp_path / "model", parent, lora, "fp32")
    adapted = peft.PeftModel.from_pretrained(task.load_model(parent, torch.float32), str(directory / "adapter"))
    sums = measure(task, adapted, live.rows, limit=8, seed=0, micro_batch=4, device=CPU)
    assert task.summarise(sums)["loss"] == pytest.approx(live.loss, rel=1e-6)


class Forgetful(CausalLM):
    """A task that loads another model than was written: half as sure of itself."""

    name: ClassVar[str] = "forgetful"

    def load_model(
        self, directory: Path, dtype: torch.dtype | None = None, config: Mapping[str, Any] | None = None
    ) -> torch.nn.Module:
        model = super().load_model(directory, dtype, config)
        model.get_output_embeddings().register_forward_hook(lambda head, given, logits: logits / 2)  # type: ignore[operator]
        return model


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_that_is_another_one_from_its_files_is_refused_and_not_left(parent, precision, tmp_path):
    with pytest.raises(WrongExport, match=r"its loss on the held-out rows is \S+ from the files, and was") as caught:
        exported(tmp_path / "model", parent, None, precision, Forgetful)
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


class Damaging(CausalLM):
    """A task whose files overwrite a weight."""

    name: ClassVar[str] = "damaging"

    def save(self, directory: Path) -> None:
        from safetensors.torch import load_file, save_file

        super().save(directory)
        weights = load_file(directory / "model.safetensors")
        name = next(name for name in weights if "mlp" in name and weights[name].ndim == 2)
        save_file({**weights, name: weights[name] * 0.5}, directory / "model.safetensors", {"format": "pt"})


def test_a_weight_that_does_not_load_back_is_named(parent, tmp_path):
    with pytest.raises(WrongExport, match=r"mlp\.\S+ does not load back"):
        exported(tmp_path / "model", parent, None, "fp32", Damaging)
    assert list(tmp_path.iterdir()) == []


def test_a_generation_config_is_kept_whatever_its_flags(parent, tmp_path):
    odd = {"do_sample": False, "temperature": 0.5, "top_k": 3, "eos_token_id": [1, 2]}
    task, weights, _ = trained(parent, None)

    def fresh() -> torch.nn.Module:
        from transformers import GenerationConfig

        model = task.load_model(parent, torch.float32)
        model.generation_config = GenerationConfig.from_dict(odd)
        return model

    export(tmp_path / "model", task, weights, fresh, "fp32", None, lambda written: None)
    written = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert odd.items() <= written.items()


def test_what_is_written_whole_is_in_files_of_a_size_too(parent, tmp_path):
    model = CausalLM.load(parent).load_model(parent, torch.float32)
    largest = max(tensor.nbytes for tensor in model.state_dict().values())
    save(model, tmp_path, largest)
    written = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(written) > 1
    assert max(path.stat().st_size for path in written) < largest + 10_000  # with its header
    found = CausalLM.load(parent).load_model(tmp_path, torch.float32).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("loss", "written", "precision", "same"),
    [
        (5.75, 5.75002, "fp32", True),
        (5.75, 5.76, "fp32", False),
        (5.75, 5.755, "bf16", True),
        (5.75, 6.0, "bf16", False),
        (0.0, 5e-4, "bf16", True),
        (0.0, 5e-4, "fp32", False),
        (2.0, float("nan"), "bf16", False),
        (float("nan"), 2.0, "bf16", False),
    ],
)
def test_what_counts_as_rounding(loss, written, precision, same):
    if same:
        check_loss(loss, written, precision, "rows")
    else:
        with pytest.raises(WrongExport, match="not the one that was trained"):
            check_loss(loss, written, precision, "rows")
