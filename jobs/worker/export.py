"""Trained weights → one directory in the Hugging Face layout, checked by loading it again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from cluster.precision import Precision
from jobs.spec import LoraSpec
from jobs.tasks import Task

DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}


def add_lora(model: torch.nn.Module, lora: LoraSpec) -> torch.nn.Module:
    """Freeze the model and add trainable low-rank adapters.

    Raises:
        UserError: no layer has one of the names in `target_modules`.
    """
    import peft

    from cluster.errors import UserError

    settings = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=lora.target_modules, bias="none"
    )
    try:
        return peft.get_peft_model(model, settings)
    except ValueError as error:
        raise UserError(f"model.lora: {str(error).splitlines()[0]}") from error


def export(
    directory: Path,
    task: Task,
    weights: dict[str, torch.Tensor],
    fresh_model: Callable[[], torch.nn.Module],
    precision: Precision,
    lora: LoraSpec | None,
) -> None:
    """Write the model directory: safetensors, config, and what the task learned; adapters are merged.

    Args:
        weights: each in its whole shape, on the CPU.
        fresh_model: makes the model that they belong to.

    Raises:
        RuntimeError: the files do not load back to the weights that were written.
    """
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model = fresh_model()
    if lora is not None:
        wrapped = add_lora(model, lora)
        wrapped.load_state_dict(weights)
        wrapped.save_pretrained(str(partial / "adapter"))  # type: ignore[operator]
        model = wrapped.merge_and_unload()  # type: ignore[operator]
    else:
        model.load_state_dict(weights)
    model.to(DTYPES[precision]).save_pretrained(str(partial))  # type: ignore[operator]
    task.save(partial)
    _check(partial, task, model)
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)


def _check(directory: Path, task: Task, written: torch.nn.Module) -> None:
    loaded = dict(task.load_model(directory).named_parameters())
    for name, parameter in written.named_parameters():
        if not torch.equal(loaded[name], parameter):
            raise RuntimeError(f"{directory}: {name} does not load back as it was written")
