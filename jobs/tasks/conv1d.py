"""Conv1D, gpt2's linear layer with its weight transposed: what quantises linear layers passes it over.

A quantised gpt2 is therefore written with plain linear layers. Its config says so (`LINEAR`), and `class_of` builds it
that way; transformers alone refuses such a folder, since the shapes of the weights are not those of its gpt2.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

LINEAR = "conv1d_as_linear"
"""The entry of a model's config that says that its Conv1D layers are linear ones."""


def layers(model: torch.nn.Module) -> list[str]:
    """Return the names of the model's Conv1D layers."""
    from transformers.pytorch_utils import Conv1D

    return [name for name, module in model.named_modules() if isinstance(module, Conv1D)]


def as_linear(model: torch.nn.Module) -> None:
    """Replace each Conv1D, weight (in, out), by a linear layer that computes the same, weight (out, in)."""
    import torch

    for name in layers(model):
        old = model.get_submodule(name)
        new = torch.nn.Linear(old.nx, old.nf, device=old.weight.device, dtype=old.weight.dtype)
        new.weight = torch.nn.Parameter(old.weight.detach().T.contiguous())
        new.bias = old.bias
        model.set_submodule(name, new)


def save(model: Any, directory: Path) -> None:
    """Write a model with Conv1D layers as one with linear layers, in place."""
    as_linear(model)
    setattr(model.config, LINEAR, True)
    model.save_pretrained(str(directory))


def class_of(directory: Path | str) -> Any | None:
    """Return the class that loads what `save` wrote, also quantised since; None for any other folder, or a hub id."""
    path = Path(directory) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return _linear_class(config["architectures"][0]) if config.get(LINEAR) else None


@cache
def _linear_class(architecture: str) -> Any:
    """Return the transformers class of that name, built with linear layers."""
    import transformers

    base = getattr(transformers, architecture)

    def build(self: Any, config: Any, *arguments: Any, **named: Any) -> None:
        base.__init__(self, config, *arguments, **named)
        as_linear(self)

    return type(architecture, (base,), {"__init__": build, "__module__": base.__module__})
