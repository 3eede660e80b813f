"""Causal language models: `lstm`, ours, and those of transformers; checked, built and loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.tasks import loading
from jobs.tasks.architectures import check_builds, config_for

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


def _config(architecture: str, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> Any:
    return config_for(architecture, dict(config), TABLE, "causal", dict(defaults), OURS)


def _source() -> Any:
    """Return transformers' class that makes and reads them, which knows ours too."""
    from transformers import AutoModelForCausalLM

    from jobs.tasks import lstm

    lstm.register()
    return AutoModelForCausalLM
