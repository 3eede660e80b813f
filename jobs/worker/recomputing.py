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
from jobs.worker.torch_internals import TorchDispatchMode

aten = torch.ops.aten
KEPT = frozenset(
    operation
    for operation in FORMULAS
    if operation not in (aten.bmm, aten.baddbmm) and not operation.__name__.endswith("backward")
)


def enable(model: torch.nn.Module, how: Literal[True, "selective"], compiled: bool = False) -> None:
    """Have each layer of a model computed again in the backward pass.

    Args:
        compiled: whether it will run compiled.

    Raises:
        UserError: the model's layers cannot be.
    """
    check(model)
    settings: dict[str, Any] = {"use_reentrant": False}
    if how == "selective":
        settings["context_fn"] = partial(create_selective_checkpoint_contexts, policy) if compiled else contexts
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)  # type: ignore[operator]


class OfKept(TorchDispatchMode):
    """Hands operations whose outputs are kept to one of torch's two modes; all others are none of its business.

    torch's own refuse a second pass that does other than the first: ZeRO stage 3 gathers weights in one of them and has
    them still in the other. A compiler, which knows no hooks, wants to be told of all operations.
    """

    supports_higher_order_operators = True

    def __init__(self, mode: Any) -> None:
        super().__init__()
        self._mode = mode

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, or have it run or remembered."""
        if getattr(func, "overloadpacket", None) in KEPT:
            return self._mode.__torch_dispatch__(func, types, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def contexts() -> tuple[OfKept, OfKept]:
    """Return what a layer's first pass runs in, and its second."""
    first, again = create_selective_checkpoint_contexts(policy)
    return OfKept(first), OfKept(again)


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
