"""ZeRO stage 3 from the first number on: a model without weights gets this rank's part of each parameter, no more."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from jobs.checkpoint.resume import Fill
from jobs.worker import deepspeed_internals, swap_internals


def divide(model: torch.nn.Module, config: dict[str, Any], dtype: torch.dtype, fill: Fill) -> None:
    """Put in place of each parameter, on the meta device, one of which this rank has its part; tied ones stay tied."""
    init = deepspeed_internals.partitioner(config, dtype, swap_internals.files_of(config))
    made: dict[int, torch.nn.Parameter] = {}
    for name, old in list(model.named_parameters(remove_duplicate=False)):
        if id(old) not in made:
            made[id(old)] = deepspeed_internals.in_parts(init, old, dtype, partial(fill, name))
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, made[id(old)])
