"""Linear layers of the TorchRunner on CPU: bf16 weights packed once for oneDNN, int8 and int4 weights.

F.linear packs a bf16 weight again at every call; packed once, the same products take 0.55 to 0.85 of the time at 1 to
64 rows. It is what torch.compile does to frozen weights. fp32 weights stay as they are.

Where bf16 is emulated, activations are fp32 and quantised layers have two ways to multiply. torch's int8 and int4
kernels take bf16 rows, widen them and sum in fp32: quick with AVX2 too (in fp32 the same kernels are scalar code, 10 to
40 times slower). For more rows the int8 weight is expanded into a buffer that all layers share, and multiplied in fp32.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn
from torch.nn.functional import linear as multiply
from transformers.pytorch_utils import Conv1D

from serve.engines.torch import torch_internals
from serve.engines.torch.torch_internals import stored_int8

Weights = Literal["bf16", "int8", "int4"]
INT8_KERNEL_ROWS = {torch.bfloat16: 8, torch.float32: 32}
"""Rows up to which torch's int8 kernel is faster than expanding the weight first, by the dtype of the activations."""
INT4_GROUP = 32
"""Weights of a row that share a scale and an offset."""


class PackedLinear(nn.Module):
    """y = x·Wᵀ + b for a bf16 weight [out, in] in oneDNN's own layout."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        # not a buffer: an opaque layout can be neither saved nor moved
        self.packed = torch_internals.pack_bf16(weight)
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch_internals.linear_packed(x, self.packed, self.bias)


class Expanded:
    """Room for one expanded weight, shared by layers that compute one after another.

    Fresh memory for each product costs page faults: 2.8 ms instead of 0.3 for 2816 × 1024 in fp32.
    """

    def __init__(self) -> None:
        self._room = torch.empty(0)

    def of(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return a weight (int8, any shape) in `dtype`, until the next call."""
        room = self._room
        if room.dtype != dtype or room.device != weight.device or room.numel() < weight.numel():
            self._room = room = torch.empty(weight.numel(), dtype=dtype, device=weight.device)
        return room[: weight.numel()].view_as(weight).copy_(weight)


class Int8Linear(nn.Module):
    """y = x·(q·scale)ᵀ + b for int8 weights q [out, in] with one scale for each output; x is bf16 or fp32."""

    def __init__(
        self,
        quantised: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
        expanded: Expanded | None = None,
    ) -> None:
        super().__init__()
        self._expanded = expanded or Expanded()
        self.out_features, self.in_features = quantised.shape
        self.quantised = quantised
        self.scale = scale.float().flatten()
        self.ones = torch.ones_like(self.scale, dtype=torch.bfloat16)
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, -2)
        if len(rows) <= INT8_KERNEL_ROWS[x.dtype] and rows.device.type == "cpu":
            # its own scales would be rounded to bf16
            y = torch_internals.multiply_int8(rows.to(torch.bfloat16), self.quantised, self.ones)
        else:
            y = multiply(rows, self._expanded.of(self.quantised, x.dtype))
        y = (y * self.scale).to(x.dtype)
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)


class Int4Linear(nn.Module):
    """y = x·Wᵀ + b for 4-bit weights in groups along the input, each with a scale and an offset; x is bf16 or fp32."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        quantised, scale, middle = int4_groups(weight.float())
        self.packed = torch_internals.pack_int4(quantised)
        scales = torch.stack([scale, middle], dim=-1)
        self.scales = scales.transpose(0, 1).contiguous().to(torch.bfloat16)
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, -2).to(torch.bfloat16)
        y = torch_internals.multiply_int4(rows, self.packed, INT4_GROUP, self.scales).to(x.dtype)
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)


def int8_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (int8 weights [out, in], fp32 scales [out]), symmetric."""
    scale = weight.float().abs().amax(dim=1).clamp(min=1e-12) / 127
    return (weight.float() / scale[:, None]).round().to(torch.int8), scale


def int4_groups(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (int32 weights of 0..15, scale, value of 8), the latter two [out, groups]: w ≈ (q - 8)·scale + value."""
    groups = weight.unflatten(1, (-1, INT4_GROUP))
    lowest, highest = groups.amin(dim=-1), groups.amax(dim=-1)
    scale = ((highest - lowest) / 15).clamp(min=1e-12)
    quantised = ((groups - lowest[..., None]) / scale[..., None]).round().clamp(0, 15)
    return quantised.flatten(1).to(torch.int32), scale, lowest + 8 * scale


def pack(model: nn.Module, weights: Weights = "bf16") -> int:
    """Replace the model's linear layers on CPU by packed or quantised ones; return how many.

    The output head keeps its dtype when other weights are quantised, and so do all fp32 weights when none are. A weight
    that is also an embedding stays in memory for that use. int8 weights that torchao has stored are taken as they are;
    with other `weights` torchao computes with them.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    replaced, expanded = 0, Expanded()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            packed = _packed(child, weights, child is head, expanded)
            if packed is not None:
                setattr(parent, name, packed)
                replaced += 1
    return replaced


def _packed(module: Any, weights: Weights, is_head: bool, expanded: Expanded) -> nn.Module | None:
    """Return what replaces exactly a linear layer on CPU (a subclass may compute something else), or None."""
    if type(module) is not nn.Linear and type(module) is not Conv1D:
        return None
    if module.weight.dtype not in INT8_KERNEL_ROWS or module.weight.device.type != "cpu":
        return None
    stored = stored_int8(module.weight)
    if stored is not None:
        return Int8Linear(*stored, module.bias, expanded) if weights == "int8" else None
    if type(module.weight) is not nn.Parameter:  # quantised in some other way: its own kernels compute
        return None
    weight = module.weight.detach().T if isinstance(module, Conv1D) else module.weight.detach()
    if weights == "int8" and not is_head:
        return Int8Linear(*int8_rows(weight), module.bias, expanded)
    if weights == "int4" and not is_head and weight.shape[1] % INT4_GROUP == 0 and weight.shape[0] % 16 == 0:
        return Int4Linear(weight, module.bias)
    can_pack = weight.dtype == torch.bfloat16 and torch_internals.packs_bf16()
    return PackedLinear(weight, module.bias) if can_pack else None
