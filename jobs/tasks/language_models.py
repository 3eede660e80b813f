"""Causal language models: `lstm`, ours, and those of transformers; checked, built and loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.tasks import TaskError, loading
from jobs.tasks.architectures import LENGTHS, check_builds, config_for, positions

if TYPE_CHECKING:
    import torch


TABLE = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
"""The name of transformers' own table of the causal architectures."""
OURS = ("lstm",)


def check(architecture: str, config: Mapping[str, Any]) -> None:
    """Raise TaskError for an unknown architecture, an entry that its config has not, or what makes no model."""
    check_builds(_source(), architecture, _config(architecture, config, {}))


def check_parent(directory: Path, config: Mapping[str, Any]) -> Any:
    """Return the config of a model directory with the entries of `config`.

    Raises:
        TaskError: it is no causal model, or has no place for an entry.
    """
    _source()
    return loading.check_parent(directory, config, TABLE, "causal")


def config_of(architecture: str, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> Any:
    """Return the config of an architecture; entries of `defaults` that it has no place for are left out.

    Raises:
        TaskError: as `check`.
    """
    _source()
    return _config(architecture, config, defaults)


def build(config: Any) -> torch.nn.Module:
    """Make a model with fresh weights in fp32."""
    import torch

    model: torch.nn.Module = _source().from_config(config, dtype=torch.float32)
    return model


def load(directory: Path, dtype: torch.dtype | None, config: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """Load a model directory or a hub id, in evaluation mode; return what is to be said about it, too."""
    return loading.load(_source(), directory, dtype, config)


def defaults(tokenizer: Any, length: int) -> dict[str, Any]:
    """Return the entries of a config that follow from the tokenizer, and from the length of rows."""
    return {
        "vocab_size": len(tokenizer),
        **dict.fromkeys(LENGTHS, length),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def check_fits(config: Any, tokenizer: Any, length: int | None) -> None:
    """Refuse tokens or positions that the model has no embeddings for: some later step would fail.

    Raises:
        TaskError: there are such.
    """
    if config.vocab_size < len(tokenizer):
        raise TaskError(f"the model's vocab_size is {config.vocab_size}, but the tokenizer has {len(tokenizer)} tokens")
    check_length(config, length)


def check_length(config: Any, length: int | None) -> None:
    """Refuse rows that are longer than the model's positions; None: there are no rows.

    Raises:
        TaskError: they are.
    """
    limit = positions(config)
    if length is not None and limit is not None and limit[1] < length:
        raise TaskError(
            f"task.sequence_length is {length}, but the model has {limit[1]} positions (model.config.{limit[0]})"
        )


def _config(architecture: str, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> Any:
    return config_for(architecture, dict(config), TABLE, "causal", dict(defaults), OURS)


def _source() -> Any:
    """Return transformers' class that makes and reads them, which knows ours too."""
    from transformers import AutoModelForCausalLM

    from jobs.tasks import lstm

    lstm.register()
    return AutoModelForCausalLM
