"""What recording a model's construction takes of torch's insides (2.13): operations, their storages and their trees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from cluster.internals import Internal

__all__ = [
    "GROUPED_PRODUCT",
    "TorchDispatchMode",
    "listen_to_collectives",
    "listen_to_compiler",
    "ranks_among",
    "storage_key",
    "tree_leaves",
    "tree_map_only",
    "truncated_whole",
    "written",
]

ENTRIES = (
    Internal(
        "torch.utils._python_dispatch.TorchDispatchMode",
        "to see each operation on a model's tensors while it is built without memory, and what a step multiplies and "
        "sends; documented, but kept there",
        "no model can be recorded, ZeRO-3 builds every model whole on every rank, and no run is told its FLOPs",
        "torch gives it a public place",
    ),
    Internal(
        "torch.utils._pytree.tree_leaves, tree_map_only",
        "to find the tensors among an operation's arguments",
        "as for TorchDispatchMode",
        "as for TorchDispatchMode",
    ),
    Internal(
        "UntypedStorage._cdata",
        "to tell that two tensors share their values: tensors on the meta device have no address",
        "a parameter would be told from its own views, and keep the values it had before them",
        "torch says whether two storages are the same",
    ),
    Internal(
        "OpOverload._schema",
        "to know which of its arguments an operation changes",
        "what is written through `out=` or several arguments at once would be missed",
        "torch.library tells the schema of an operation",
    ),
    Internal(
        "torch.ops.aten._grouped_mm",
        "the operation of transformers' experts, whose products count as FLOPs",
        "runs of mixtures are told no FLOPs, and why",
        "torch.nn.functional.grouped_mm's operation has a public name",
    ),
    Internal(
        "ScriptObject._type",
        "to find the process group among a collective's arguments, and how many ranks are in it",
        "no run is told the bytes of its collectives",
        "a dispatch mode is told the group as a ProcessGroup",
    ),
    Internal(
        "methods of torch.distributed.ProcessGroup and Work, replaced",
        "to time each collective and each wait for one, whoever asks for it: torch, DeepSpeed, this code",
        "a method of another name is not timed: `communication_s` is too small",
        "torch tells when a collective begins and ends, on CPUs too",
    ),
    Internal(
        "torch._dynamo.callback.callback_handler",
        "to tell a step's time from that of the compiler, which is no hang",
        "a compiler that works for long is taken for a hang, and `compile_s` is not told",
        "torch.compiler tells when it begins and ends",
    ),
    Internal(
        "torch.nn.init._no_grad_trunc_normal_",
        "replaced while recording by one operation: it draws again until no number is too large, which takes values",
        "models that draw so (ViT and its kin) cannot be recorded",
        "torch draws truncated normal numbers in one operation",
    ),
)


GROUPED_PRODUCT = torch.ops.aten._grouped_mm


def storage_key(tensor: torch.Tensor) -> int:
    """Return a number that tensors of any shape share which are looks at the same values; it may come again later."""
    return int(tensor.untyped_storage()._cdata)


def ranks_among(arguments: Any) -> int:
    """Return how many ranks are in the process group among a collective's arguments."""
    boxed = (each for each in arguments if isinstance(each, torch.ScriptObject))
    return next(dist.ProcessGroup.unbox(each).size() for each in boxed if "ProcessGroup" in str(each._type()))


def written(operation: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """Return the tensors, of any shape, among the arguments that an operation changes."""
    found = []
    for index, argument in enumerate(operation._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            found += [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return found


def listen_to_compiler(start: Callable[[Any], None], end: Callable[[Any], None]) -> None:
    """Have functions called when a compiler begins to work in this process, and when it ends; the last ones alone."""
    from torch._dynamo.callback import callback_handler

    callback_handler.start_callbacks[:] = [start]
    callback_handler.end_callbacks[:] = [end]


COLLECTIVES = (
    "all_gather_single",
    "all_gather_single_coalesced",
    "all_to_all_single",
    "allgather",
    "allgather_coalesced",
    "allreduce",
    "allreduce_coalesced",
    "alltoall",
    "barrier",
    "broadcast",
    "gather",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_single",
    "reduce_scatter_single_coalesced",
    "scatter",
    "_end_coalescing",
)
"""Methods by which torch.distributed has a process group begin collectives; they return a Work to wait for."""


def listen_to_collectives(begin: Callable[[], Any], end: Callable[[Any], None]) -> Callable[[], None]:
    """Have functions called before and after each collective of this process, and each wait for one.

    Args:
        begin: its result is what `end` is given.

    Returns:
        What has them called no more.
    """

    def heard(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            begun = begin()
            try:
                return method(*arguments, **keywords)
            finally:
                end(begun)

        return call

    kinds = [(dist.ProcessGroup, name) for name in COLLECTIVES] + [(dist.Work, "wait")]
    plain = [(kind, name, vars(kind)[name]) for kind, name in kinds]  # by getattr it would forget whose method it is
    for kind, name, _ in plain:
        setattr(kind, name, heard(getattr(kind, name)))

    def stop() -> None:
        for kind, name, method in plain:
            setattr(kind, name, method)

    return stop


@contextmanager
def truncated_whole() -> Iterator[None]:
    """Have torch.nn.init.trunc_normal_ be one operation meanwhile, which a dispatch mode sees as such."""
    operation, original = _trunc_normal(), torch.nn.init._no_grad_trunc_normal_

    def draw(tensor: torch.Tensor, mean: float, std: float, a: float, b: float, generator: Any = None) -> torch.Tensor:
        with torch.no_grad():
            operation(tensor, mean, std, a, b, generator=generator)
        return tensor

    torch.nn.init._no_grad_trunc_normal_ = draw
    try:
        yield
    finally:
        torch.nn.init._no_grad_trunc_normal_ = original


@cache
def _trunc_normal() -> Callable[..., torch.Tensor]:
    """Make the operation known to torch, once in a process."""
    original = torch.nn.init._no_grad_trunc_normal_
    library = torch.library.Library("tandem", "FRAGMENT")
    schema = "(Tensor(a!) self, float mean, float std, float a, float b, *, Generator? generator=None) -> Tensor(a!)"
    library.define(f"trunc_normal_{schema}", tags=(torch.Tag.nondeterministic_seeded,))

    def draw(self: torch.Tensor, mean: float, std: float, a: float, b: float, *, generator: Any = None) -> torch.Tensor:
        return original(self, mean, std, a, b, generator=generator)

    def skip(self: torch.Tensor, *_: float, generator: Any = None) -> torch.Tensor:
        return self

    library.impl("trunc_normal_", draw, "CPU")
    library.impl("trunc_normal_", skip, "Meta")
    _libraries.append(library)
    return torch.ops.tandem.trunc_normal_.default


_libraries: list[torch.library.Library] = []
"""Kept: an operation goes with its library."""
