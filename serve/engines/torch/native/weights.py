"""A decoder's weights in the kernels' layouts (kernels/linear.h), padded to whole tiles, in bf16, int8 or int4."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from serve.engines.torch.linear import Weights
from serve.engines.torch.native import library
from serve.engines.torch.native.library import CLinear, pointer
from serve.engines.torch.native.structure import LayerWeights, Matrix

PAIR, DEPTH = 32, 64
"""What the columns and the inputs of a packed weight are multiples of."""
GROUP = 32
"""Inputs that share an int4 scale."""
SCALE_BITS = 5
"""Significant bits of an int4 scale: times a 4-bit integer it is still exact in bf16."""
SHRINKS = (1.0, 0.94, 0.88, 0.82, 0.76)
"""Scales tried for each int4 group, relative to the one that reaches its largest weight."""


def up_to(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


@dataclass(frozen=True)
class Packed:
    """A packed weight [n, k] and what belongs to it; `struct` points into the tensors."""

    kind: str
    n: int
    k: int
    data: torch.Tensor
    scale: torch.Tensor | None
    bias: torch.Tensor | None

    @property
    def struct(self) -> CLinear:
        return CLinear(
            library.KINDS[self.kind], self.n, self.k, pointer(self.data), pointer(self.scale), pointer(self.bias)
        )


def pack(matrix: Matrix, weights: Weights) -> Packed:
    """Quantise the matrix if it is to be, and lay it out. One that is stored as int8 stays what it is."""
    rows, columns = matrix.values.shape
    n, k = up_to(rows, PAIR), up_to(columns, DEPTH)
    kind: Weights = "int8" if matrix.scale is not None else weights
    native, packed = library.load(), _room(kind, n, k)
    bias = None if matrix.bias is None else pad(matrix.bias.float(), (0, n - rows)).contiguous()
    scale = None
    if kind == "bf16":
        values = matrix.values.contiguous()
        native.tandem_pack_bf16(pointer(values), rows, columns, n, k, pointer(packed))
    elif kind == "int8":
        values, scale = (matrix.values, matrix.scale) if matrix.scale is not None else quantise_int8(matrix.values)
        values, scale = values.contiguous(), pad(scale, (0, n - rows)).contiguous()
        native.tandem_pack_int8(pointer(values), rows, columns, n, k, pointer(packed))
    else:
        values, scales = quantise_int4(pad(matrix.values, (0, k - columns)))
        native.tandem_pack_int4(pointer(values), pointer(scales), rows, k, n, pointer(packed))
    return Packed(kind, n, k, packed, scale, bias)


def _room(kind: str, n: int, k: int) -> torch.Tensor:
    return library.allocate(library.load().tandem_packed_bytes(library.KINDS[kind], n, k))


def quantise_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (int8 values [rows, columns], float32 scales [rows]), symmetric; the error is at most half a scale."""
    scale = weight.float().abs().amax(dim=1).clamp(min=1e-12) / 127
    return (weight.float() / scale[:, None]).round().to(torch.int8), scale


def quantise_int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (int8 values of -8..7 [rows, columns], bf16 scales [rows, columns / GROUP]).

    A scale's sign puts the group's largest weight on -8, which reaches further than 7; of a few magnitudes the one
    with the least squared error is taken.
    """
    groups = weight.float().unflatten(1, (-1, GROUP))
    largest = groups.gather(-1, groups.abs().argmax(dim=-1, keepdim=True))
    best_error = torch.full_like(largest, float("inf"))
    best_scale, best = torch.ones_like(largest), torch.zeros_like(groups)
    for shrink in SHRINKS:
        scale = _rounded_scale(largest * (shrink / -8))
        values = (groups / scale).round().clamp(-8, 7)
        error = (values * scale - groups).square().sum(dim=-1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best = torch.where(better, values, best)
    return best.flatten(1).to(torch.int8).contiguous(), best_scale[..., 0].bfloat16().contiguous()


def _rounded_scale(scale: torch.Tensor) -> torch.Tensor:
    """Round to SCALE_BITS significant bits; zero becomes 1, where all weights are zero anyway."""
    mantissa, exponent = torch.frexp(scale)
    steps = 2**SCALE_BITS
    rounded = torch.ldexp((mantissa * steps).round() / steps, exponent)
    return torch.where(rounded == 0, torch.ones_like(rounded), rounded)


def fused_heads(layer: LayerWeights, head_dim: int, width: int) -> Matrix:
    """Return queries, keys and values as one matrix, each head padded to `width` rows."""

    def widen(rows: torch.Tensor) -> torch.Tensor:
        heads = rows.unflatten(0, (-1, head_dim))
        return pad(heads, (0, 0) * (rows.dim() - 1) + (0, width - head_dim)).flatten(0, 1)

    return _stacked([part.rows(widen) for part in (layer.queries, layer.keys, layer.values)])


def widened_out(layer: LayerWeights, head_dim: int, width: int) -> Matrix:
    """Return the output projection for heads padded to `width`."""
    values = layer.out.values
    if width != head_dim:
        values = pad(values.unflatten(1, (-1, head_dim)), (0, width - head_dim)).flatten(1)
    return Matrix(values, layer.out.scale, layer.out.bias)


def fused_up(layer: LayerWeights) -> Matrix:
    """Return gate and input projection as one matrix, 16 rows of each in turn; without a gate the input projection."""
    inner = up_to(layer.up.values.shape[0], DEPTH)

    def whole(rows: torch.Tensor) -> torch.Tensor:
        return pad(rows, (0, 0) * (rows.dim() - 1) + (0, inner - rows.shape[0]))

    if layer.gate is None:
        return layer.up.rows(whole)
    both = _stacked([layer.gate.rows(whole), layer.up.rows(whole)])
    return both.rows(lambda rows: rows.unflatten(0, (2, -1, 16)).transpose(0, 1).flatten(0, 2))


def _stacked(parts: list[Matrix]) -> Matrix:
    """Stack matrices of one kind; a bias that only some have is zero for the others."""
    if len({part.scale is None for part in parts}) > 1:  # some layers quantised, some not: bf16 holds both
        parts = [_plain(part) for part in parts]
    values = torch.cat([part.values for part in parts])
    scale = torch.cat([part.scale for part in parts if part.scale is not None]) if parts[0].scale is not None else None
    if all(part.bias is None for part in parts):
        return Matrix(values, scale)
    zeros = [torch.zeros(part.values.shape[0]) if part.bias is None else part.bias.float() for part in parts]
    return Matrix(values, scale, torch.cat(zeros))


def _plain(matrix: Matrix) -> Matrix:
    if matrix.scale is None:
        return matrix
    return Matrix((matrix.values.float() * matrix.scale[:, None]).bfloat16(), None, matrix.bias)
