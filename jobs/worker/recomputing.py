"""Activations that are computed again in the backward pass instead of being kept: all of a layer's, or some.

The second is selective checkpointing (Korthikanti et al. 2022, arXiv:2205.05198, section 5): outputs of linear layers,
convolutions and fused attention are kept, which cost most time to make again; the rest (norms, activation functions,
rotary positions, dropout, casts) is cheap and is made again from them. Products of batches of matrices count as the
rest: in attention that is not fused they are the scores, as large as the square of a row's length.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from cluster.errors import UserError
from jobs.worker.flops import FORMULAS

aten = torch.ops.aten
KEPT = frozenset(
    operation
    for operation in FORMULAS
    if operation not in (aten.bmm, aten.baddbmm) and not operation.__name__.endswith("backward")
)


def enable(model: torch.nn.Module, how: Literal[True, "selective"]) -> None:
    """Have each layer of a model computed again in the backward pass.

    Raises:
        UserError: the model's layers cannot be.
    """
    check(model)
    settings: dict[str, Any] = {"use_reentrant": False}
    if how == "selective":
        settings["context_fn"] = partial(create_selective_checkpoint_contexts, policy)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)  # type: ignore[operator]


def policy(context: Any, operation: Any, *arguments: Any, **keywords: Any) -> CheckpointPolicy:
    """Say what becomes of an operation's output."""
    kept = getattr(operation, "overloadpacket", None) in KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def check(model: torch.nn.Module) -> None:
    """Refuse a model whose layers cannot be computed again.

    Raises:
        UserError: it is one.
    """
    inner = getattr(model, "base_model", model)  # adapters answer for themselves
    if not getattr(getattr(inner, "model", inner), "supports_gradient_checkpointing", False):
        raise UserError(
            f"training.gradient_checkpointing: {type(model).__name__} cannot compute its layers again; leave it out"
        )
