"""Linear layers of the TorchRunner on CPU: bf16 weights packed once for oneDNN, int8 and int4 weights.

F.linear packs a bf16 weight again at every call; packed once, the same products take 0.55 to 0.85 of the time at 1 to
64 rows. It is what torch.compile does to frozen weights. fp32 weights stay as they are.
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
INT8_KERNEL_ROWS = 8
"""Rows up to which torch's int8 kernel is faster than expanding the weight to bf16 first."""
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


class Int8Linear(nn.Module):
    """y = x·(q·scale)ᵀ + b for int8 weights q [out, in] with one scale for each output, computed in bf16."""

    def __init__(self, quantised: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = quantised.shape
        self.quantised = quantised
        self.scale = scale.float().flatten()
        self.ones = torch.ones_like(self.scale, dtype=torch.bfloat16)
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, -2)
        if len(rows) <= INT8_KERNEL_ROWS and rows.device.type == "cpu":
            # its own scales would be rounded to bf16
            y = torch_internals.multiply_int8(rows, self.quantised, self.ones)
        else:
            y = multiply(rows, self.quantised.to(x.dtype))
        y = (y * self.scale).to(x.dtype)
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)


class Int4Linear(nn.Module):
    """y = x·Wᵀ + b for 4-bit weights in groups along the input, each with a scale and an offset."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        quantised, scale, middle = int4_groups(weight.float())
        self.packed = torch_internals.pack_int4(quantised)
        scales = torch.stack([scale, middle], dim=-1)
        self.scales = scales.transpose(0, 1).contiguous().to(torch.bfloat16)
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch_internals.multiply_int4(x.flatten(0, -2), self.packed, INT4_GROUP, self.scales)
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)


def int8_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (int8 weights, fp32 scale of each row), symmetric."""
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
    """Replace the model's bf16 linear layers on CPU by packed ones; return how many.

    The output head stays in bf16 when other weights are quantised. A weight that is also an embedding stays in memory
    for that use. int8 weights that torchao has stored are taken as they are.
    """
    if not torch_internals.has_bf16():
        return 0
    head = model.get_output_embeddings()  # type: ignore[operator]
    replaced = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            packed = _packed(child, "bf16" if child is head else weights)
            if packed is not None:
                setattr(parent, name, packed)
                replaced += 1
    return replaced


def _packed(module: Any, weights: Weights) -> nn.Module | None:
    """Return what replaces exactly a linear layer (a subclass may compute something else) with a bf16 weight on CPU."""
    if type(module) is not nn.Linear and type(module) is not Conv1D:
        return None
    if module.weight.dtype != torch.bfloat16 or module.weight.device.type != "cpu":
        return None
    stored = stored_int8(module.weight)
    if stored is not None:
        return Int8Linear(*stored, module.bias)
    if type(module.weight) is not nn.Parameter:  # quantised in some other way: its own kernels compute
        return None
    weight = module.weight.detach().T if isinstance(module, Conv1D) else module.weight.detach()
    if weights == "int8":
        return Int8Linear(*int8_rows(weight), module.bias)
    if weights == "int4" and weight.shape[1] % INT4_GROUP == 0 and weight.shape[0] % 16 == 0:
        return Int4Linear(weight, module.bias)
    return PackedLinear(weight, module.bias)
