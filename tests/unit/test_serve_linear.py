"""The TorchRunner's linear layers against a plain product with the weights they stand for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers.pytorch_utils import Conv1D

from serve.engines.torch import torch_internals
from serve.engines.torch.linear import (
    Expanded,
    Int4Linear,
    Int8Linear,
    PackedLinear,
    int4_groups,
    int8_rows,
    pack,
)
from serve.engines.torch.torch_internals import stored_int8
from tests.support import tiny_models

pytestmark = pytest.mark.instructions
PACKS = torch_internals.packs_bf16()
"""Whether oneDNN keeps bf16 weights in a layout of its own: with AVX-512, even where it emulates bf16."""
ROWS = (1, 2, 8, 9, 32, 33, 70)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def error(
    layer: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None, rows: int, dtype: torch.dtype = torch.bfloat16
) -> float:
    """Relative to the product in fp32 with the same weight."""
    x = torch.randn(1, rows, weight.shape[1], dtype=dtype)
    expected = nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    return float((layer(x).float() - expected).norm() / expected.norm())


@pytest.mark.skipif(not PACKS, reason="bf16 weights in oneDNN's own layout: the CPU has no AVX-512, or may not use it")
@pytest.mark.parametrize("rows", ROWS)
def test_packed_products(rows: int) -> None:
    torch.manual_seed(rows)
    weight, bias = torch.randn(48, 96, dtype=torch.bfloat16), torch.randn(48, dtype=torch.bfloat16)
    assert error(PackedLinear(weight, bias), weight, bias, rows) < 0.005


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", ROWS)
def test_quantised_products(rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    weight, bias = torch.randn(48, 96, dtype=dtype), torch.randn(48, dtype=dtype)
    quantised, scale = int8_rows(weight)
    # a kernel takes bf16 rows; an expanded weight is multiplied in fp32, in sums of 96 terms
    bound = 96 * torch.finfo(torch.float32).eps if dtype == torch.float32 and rows > 32 else 0.005
    assert error(Int8Linear(quantised, scale, bias), quantised * scale[:, None], bias, rows, dtype) < bound
    groups, scale, middle = int4_groups(weight.float())
    expanded = (groups.unflatten(1, (-1, 32)) - 8) * scale[..., None] + middle[..., None]
    assert error(Int4Linear(weight, bias), expanded.flatten(1), bias, rows, dtype) < 0.01


def test_layers_that_share_room_for_an_expanded_weight_keep_their_own() -> None:
    torch.manual_seed(0)
    room = Expanded()
    for outputs, inputs in ((48, 96), (16, 32), (64, 128), (48, 96)):
        quantised, scale = int8_rows(torch.randn(outputs, inputs))
        layer = Int8Linear(quantised, scale, None, room)
        for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 0.005)):
            assert error(layer, quantised * scale[:, None], None, 50, dtype) < bound


def test_quantised_weights_are_near_the_originals() -> None:
    weight = torch.randn(64, 128)
    quantised, scale = int8_rows(weight)
    assert ((quantised * scale[:, None] - weight).abs() <= 0.5001 * scale[:, None]).all()
    groups, scale, middle = int4_groups(weight)
    expanded = (groups.unflatten(1, (-1, 32)) - 8) * scale[..., None] + middle[..., None]
    assert ((expanded.flatten(1) - weight).abs() <= 0.5001 * scale.repeat_interleave(32, 1)).all()


class Tiny(nn.Module):
    """A head, a Conv1D as GPT-2 has them, a plain layer and one that computes something else."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([nn.Linear(32, 64), Conv1D(64, 64), nn.Linear(64, 17)])
        self.odd = nn.Bilinear(32, 32, 4)
        self.head = nn.Linear(64, 32, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_only_plain_layers_are_replaced_and_the_head_keeps_its_bits(dtype: torch.dtype) -> None:
    kept = PackedLinear if dtype == torch.bfloat16 and PACKS else nn.Linear
    model = Tiny().to(dtype)
    assert pack(model, "int8") == 3 + (kept is PackedLinear)
    assert [type(layer) for layer in (*model.inner, model.head)] == [Int8Linear] * 3 + [kept]
    model = Tiny().to(dtype)
    conv, x = model.inner[1], torch.randn(1, 3, 64, dtype=dtype)
    expected = conv(x).detach()
    pack(model, "int4")
    # 17 outputs fill no kernel's tile
    assert [type(layer) for layer in model.inner] == [Int4Linear, Int4Linear, kept]
    assert float((model.inner[1](x).detach() - expected).norm() / expected.norm()) < 0.15


def test_fp32_layers_stay_unless_they_are_to_be_quantised() -> None:
    assert pack(Tiny()) == 0


def test_int8_weights_of_torchao_are_taken_as_they_are() -> None:
    model = tiny_models.decoder("llama", num_hidden_layers=1).to(torch.bfloat16)
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, name: "proj" in name)
    before = model.model.layers[0].mlp.up_proj.weight
    stored = stored_int8(before)
    assert stored is not None
    pack(model, "int8")
    layer = model.model.layers[0].mlp.up_proj
    assert layer.quantised.data_ptr() == stored[0].data_ptr()
    x = torch.randn(1, 5, 64, dtype=torch.bfloat16)
    expected = nn.functional.linear(x, before.dequantize())
    assert float((layer(x) - expected).float().norm() / expected.float().norm()) < 0.005
