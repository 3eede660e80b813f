"""Bytes that a rank sends to others in a step: computed from the collectives that it takes part in, not measured.

A collective of S bytes over W ranks has each send 2 (W-1)/W S for an all-reduce and (W-1)/W S for the others, if it is
done in a ring (Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations"); for a
broadcast that is the ranks' average. With Ψ weights, Rajbhandari et al. 2020 (ZeRO, arXiv:1910.02054, section 7) expect
2 Ψ numbers a step at stages 0 to 2 and 3 Ψ at stage 3. DeepSpeed 0.19 takes 3 Ψ at stages 1 and 2, since it all-reduces
gradients of which each rank keeps a part, and at stages 2 and 3 reduces them after each micro-batch.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from jobs.worker.torch_internals import TorchDispatchMode, ranks_among, tree_leaves

AT_STEP = 3
"""The step of a start that is counted: in the first two, ZeRO stage 3 finds out what it will need when."""

_TWICE = frozenset({"allreduce_", "allreduce_coalesced_"})
_LARGER_SIDE = frozenset(
    {
        "_allgather_base_",
        "_reduce_scatter_base_",
        "allgather_",
        "allgather_coalesced_",
        "allgather_into_tensor_coalesced_",
        "alltoall_",
        "alltoall_base_",
        "broadcast_",
        "reduce_",
        "reduce_scatter_",
        "reduce_scatter_tensor_coalesced_",
    }
)
_NOTHING = frozenset({"barrier", "monitored_barrier_"})


class TrafficCounter(TorchDispatchMode):
    """Adds up what this rank sends in the collectives within it."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0.0
        self.unknown: set[str] = set()
        """Operations of which it is not known what they send."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count it if it is a collective."""
        if getattr(func, "namespace", "") == "c10d":
            name = func.overloadpacket.__name__
            share = sent_share(name, ranks_among(args))
            if share is None:
                self.unknown.add(name)
            else:
                self.sent += share * max((_size(argument) for argument in args), default=0)
        return func(*args, **(kwargs or {}))


class Traffic:
    """One rank's, of one of its steps."""

    def __init__(self) -> None:
        self._step = 1
        self._counter = TrafficCounter()

    @property
    def counts(self) -> bool:
        """Whether the step at hand is the one that is counted."""
        return self._step == AT_STEP

    def counting(self) -> AbstractContextManager[Any]:
        """Return what a part of a step runs in: the counter if it is the step that is counted."""
        return self._counter if self.counts else nullcontext()

    def end_step(self) -> dict[str, float]:
        """End a step; return the bytes as a metric if it was the one that is counted, and all of it is known."""
        self._step += 1
        known = self._step == AT_STEP + 1 and not self._counter.unknown
        return {"collective_bytes": self._counter.sent} if known else {}


def sent_share(operation: str, ranks: int) -> float | None:
    """Return which part of a collective's bytes a rank sends, None where that is not known. Pure."""
    if operation in _NOTHING:
        return 0.0
    if operation in _TWICE:
        return 2 * (ranks - 1) / ranks
    return (ranks - 1) / ranks if operation in _LARGER_SIDE else None


def _size(argument: Any) -> int:
    """Return the bytes of all tensors of an argument, of any shapes."""
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(argument) if isinstance(leaf, torch.Tensor))
