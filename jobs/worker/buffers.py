"""Running statistics and what else a model learns outside its parameters: the same on all ranks after each step.

In training each rank's batch normalisation sees its own rows. Left alone, every rank would evaluate another model, and
the one that is saved and exported, rank 0's, would be none that was evaluated.
"""

from __future__ import annotations

from itertools import groupby

import torch
import torch.distributed as dist

Place = tuple[torch.nn.Module, str]
"""A module, and the name of a buffer of it: modules may put a new tensor there."""


def learned(model: torch.nn.Module) -> list[Place]:
    """Return where a model keeps tensors that are saved with it and are no parameters."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    names = [name for name in model.state_dict() if name not in parameters]
    split = [name.rpartition(".") for name in names]
    modules = dict(model.named_modules(remove_duplicate=False))
    return [(modules[path], key) for path, _, key in split if isinstance(getattr(modules[path], key), torch.Tensor)]


def match_types(model: torch.nn.Module) -> None:
    """Give running statistics the type of their layer's weights: ZeRO turns only parameters into bf16.

    torch refuses layers of both types, and the exported model has all of it in one.
    """
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if counts(module) and weight is not None:
            for key in ("running_mean", "running_var"):
                setattr(module, key, getattr(module, key).to(weight.dtype))


def average(places: list[Place]) -> None:
    """Give all ranks the mean of each rank's floating-point buffers, and rank 0's of the others. Collective.

    The mean is made in fp64, so that buffers that are equal already stay as they are, bit by bit.
    """
    if not places or dist.get_world_size() == 1:
        return
    tensors = [getattr(module, key) for module, key in places]
    floating = [tensor for tensor in tensors if tensor.is_floating_point()]
    if floating:
        flat = torch.cat([tensor.detach().flatten().double() for tensor in floating])
        dist.all_reduce(flat)
        _put(flat / dist.get_world_size(), floating)
    others = sorted((tensor for tensor in tensors if not tensor.is_floating_point()), key=lambda each: str(each.dtype))
    for _, group in groupby(others, key=lambda each: each.dtype):
        same_kind = list(group)
        flat = torch.cat([tensor.detach().flatten() for tensor in same_kind])
        wire = flat.to(torch.uint8) if flat.dtype == torch.bool else flat
        dist.broadcast(wire, src=0)
        _put(wire, same_kind)


def _put(flat: torch.Tensor, tensors: list[torch.Tensor]) -> None:
    """Copy the parts of a flat tensor (N,) into tensors of any shape, in their own types."""
    parts = flat.split([tensor.numel() for tensor in tensors])
    with torch.no_grad():
        for part, tensor in zip(parts, tensors, strict=True):
            tensor.copy_(part.view_as(tensor))


def said(model: torch.nn.Module, workers: int) -> list[str]:
    """Say what batch normalisation means on several workers; nothing for a model without."""
    kinds = sorted({type(each).__name__ for each in model.modules() if counts(each)})
    if not kinds or workers == 1:
        return []
    return [
        f"{', '.join(kinds)}: each worker normalises by the rows of its own micro-batch, so that losses depend on the "
        "number of workers; running statistics are averaged over them after each step"
    ]


def counts(module: torch.nn.Module) -> bool:
    """Tell whether a module keeps running statistics of its batches."""
    return isinstance(getattr(module, "num_batches_tracked", None), torch.Tensor)
