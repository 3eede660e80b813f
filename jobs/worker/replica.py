"""ZeRO stages 0 to 2 from the first number on: a model without weights gets them once, in what is computed in.

DeepSpeed wants the trained weights of a group behind each other in one tensor (stages 1 and 2), and copies them into
one. Here they are made in such a tensor, and DeepSpeed is told so: no rank ever has its weights twice, and in bf16 none
has them in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile

import torch

from jobs.checkpoint.resume import Fill
from jobs.worker.recorded import materialise

Flats = dict[tuple[int, int], int]
"""(address, bytes) of each tensor in which the weights of a group lie behind each other → elements of the weights."""
ALIGNMENT = 2
"""DeepSpeed pads a group with zeros to a multiple of so many elements a rank."""


def build(
    model: torch.nn.Module,
    fill: Fill,
    dtype: torch.dtype,
    device: torch.device,
    groups: Iterable[Sequence[torch.nn.Parameter]] = (),
    ranks: int = 1,
) -> Flats:
    """Put in place of each parameter, on the meta device, one with its values; tied ones stay tied.

    Args:
        fill: knows the values.
        dtype: of those that are fp32 in the model.
        groups: parameters that are to lie behind each other, in this order, of any shapes.
    """
    flats: Flats = {}
    rooms: dict[int, torch.Tensor] = {}
    for group in groups:
        members = [each for each in group if each.numel()]  # DeepSpeed leaves the others out
        if len({each.dtype for each in members}) != 1:
            continue
        numel, multiple = sum(each.numel() for each in members), ALIGNMENT * ranks
        flat = torch.empty(math.ceil(numel / multiple) * multiple, dtype=_dtype(members[0], dtype), device=device)
        flats[_key(flat)] = numel
        parts = flat[:numel].split([each.numel() for each in members])
        rooms |= {id(each): part.view(each.shape) for each, part in zip(members, parts, strict=True)}

    def room(old: torch.nn.Parameter) -> torch.Tensor:
        found = rooms.pop(id(old), None)
        return torch.empty(old.shape, dtype=_dtype(old, dtype), device=device) if found is None else found

    materialise(model, fill, room)
    return flats


def flatten(
    flats: Flats, plain: Callable[[Sequence[torch.Tensor]], torch.Tensor], tensors: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Return tensors of any shapes behind each other, (N,): without a copy where they are all of one of `flats`.

    Args:
        plain: copies them.
        tensors: the last may be padding, which is written behind the others.
    """
    first, storage = tensors[0], tensors[0].untyped_storage()
    members = list(takewhile(lambda each: each.untyped_storage().data_ptr() == storage.data_ptr(), tensors))
    padding = tensors[len(members) :]
    position = 0
    for member in members:
        if member.storage_offset() != position or not member.is_contiguous():
            return plain(tensors)
        position += member.numel()
    total = position + sum(each.numel() for each in padding)
    if position != flats.get(_key(first)) or len(padding) > 1 or total * first.element_size() > storage.nbytes():
        return plain(tensors)
    found = torch.empty(0, dtype=first.dtype, device=first.device).set_(storage, 0, (total,))
    for zeros in padding:
        found[position:] = zeros
    return found


def _dtype(parameter: torch.nn.Parameter, wanted: torch.dtype) -> torch.dtype:
    return wanted if parameter.dtype == torch.float32 else parameter.dtype


def _key(tensor: torch.Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()
