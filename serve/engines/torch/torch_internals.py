"""What the torch engine uses of torch's and torchao's insides (2.13, 0.18): kernels that have no public name yet."""

from __future__ import annotations

from typing import Any

import torch

from cluster.internals import Internal

ENTRIES = (
    Internal(
        "torch.ops.mkldnn._is_mkldnn_bf16_supported",
        "whether torch gives bf16 products on this CPU to oneDNN (from AVX-512 on, where it may emulate them)",
        "the engine cannot choose how to keep weights on a CPU, and does not start",
        "torch.backends.mkldnn tells it",
    ),
    Internal(
        "torch.ops.mkldnn._reorder_linear_weight, _linear_pointwise",
        "bf16 weights packed once for oneDNN; F.linear packs them at every call",
        "text is generated up to 1.8 times slower on CPUs with bf16",
        "torch packs frozen weights outside torch.compile too",
    ),
    Internal(
        "torch._weight_int8pack_mm",
        "int8 weights times a few rows, without expanding the weights first",
        "int8 models generate at half the speed at one stream",
        "torchao's int8 weights use that kernel on CPUs",
    ),
    Internal(
        "torch._convert_weight_to_int4pack_for_cpu, _weight_int4pack_mm_for_cpu",
        "weights of 4 bits on CPUs",
        "`precision: int4` does not work on CPUs",
        "torchao has int4 weights for CPUs",
    ),
    Internal(
        "torchao's Int8Tensor (qdata, scale, zero_point, block_size)",
        "to take the int8 weights of a quantised model as they are stored, without rounding them again",
        "a quantised model is served by torchao's own kernels: right, and slower",
        "torchao documents the tensor's parts",
    ),
)


def packs_bf16() -> bool:
    """Say whether `pack_bf16` works on this CPU; whether bf16 is quick there says cluster/precision.py."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack_bf16(weight: torch.Tensor) -> torch.Tensor:
    """Return a bf16 weight [out, in] in oneDNN's own layout: opaque, neither to be saved nor to be moved."""
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
    return packed


def linear_packed(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x·Wᵀ + b, bf16, x [..., in], for a weight from `pack_bf16`."""
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return y


def multiply_int8(rows: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return rows·(q·scale)ᵀ, bf16, for rows [n, in], int8 q [out, in] and bf16 scales [out]."""
    return torch._weight_int8pack_mm(rows, weight, scales)


def pack_int4(weight: torch.Tensor) -> torch.Tensor:
    """Return int32 weights of 0..15 [out, in] packed for `multiply_int4`."""
    return torch._convert_weight_to_int4pack_for_cpu(weight, 1)


def multiply_int4(rows: torch.Tensor, packed: torch.Tensor, group: int, scales: torch.Tensor) -> torch.Tensor:
    """Return rows·Wᵀ, bf16, for rows [n, in] and W in groups of `group` along the input.

    `scales` is [groups, out, 2], bf16: each group's scale and the value of its 8.
    """
    return torch._weight_int4pack_mm_for_cpu(rows, packed, group, scales)


def stored_int8(weight: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return (int8 weights [out, in], scales [out, 1]) of a weight that torchao quantised by row; None for others."""
    if type(weight).__name__ != "Int8Tensor" or tuple(weight.block_size) != (1, weight.shape[-1]):
        return None
    symmetric = weight.zero_point is None or not bool(weight.zero_point.any())
    return (weight.qdata, weight.scale) if symmetric else None
