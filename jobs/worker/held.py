"""A frozen base whose linear layers are held in 8 or 4 bits, with adapters trained beside them (QLoRA).

    held = Held(weight, bias, "nf4")      weight [out, in], fp32; it may go then
    y = held(x)                           x·Wᵀ + b; W is made of its bits for as long as it multiplies, and again in
                                          the backward pass, which gives x its gradient and W none

int8: a scale for each output, symmetric. nf4: blocks of 64 elements, each with the largest magnitude in it, and 16
values at the quantiles of a normal distribution (Dettmers et al. 2023, arXiv:2305.14314, section 3 and appendix E; its
second quantisation, of the magnitudes, is left out). Our own code: torchao's and bitsandbytes' tensors are parameters,
which ZeRO flattens and casts.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.functional import linear

from cluster.errors import UserError
from jobs.checkpoint.resume import Fill
from jobs.worker import heap
from jobs.worker.quantize import counted

Kind = Literal["int8", "nf4"]
BLOCK = 64
"""Elements that share a magnitude in nf4."""
AT_ONCE = 1 << 18
"""So many elements are made few bits at a time: what that takes besides fits the processor's cache."""
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


class Held(nn.Module):
    """A linear layer whose weight [out, in] is held in few bits and never trained."""

    def __init__(self, weight: torch.Tensor, bias: nn.Parameter | None, kind: Kind) -> None:
        super().__init__()
        self.kind = kind
        self.out_features, self.in_features = weight.shape
        bits, scale = int8_rows(weight) if kind == "int8" else nf4_blocks(weight)
        # Not persistent: neither state of the training nor learned by it; a checkpoint goes without, and ZeRO too.
        self.register_buffer("bits", bits, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.bias = bias

    def made(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight [out, in] that the bits stand for."""
        shape = self.out_features, self.in_features
        if self.kind == "int8":
            return (self.bits.to(dtype) * self.scale.to(dtype)[:, None]).view(shape)
        pairs = _pairs(self.bits.device).index_select(0, self.bits.int())
        flat = pairs.view(-1, BLOCK).mul_(self.scale[:, None]).view(-1)
        return flat[: shape[0] * shape[1]].view(shape).to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply x [..., in]."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        y: torch.Tensor = _Product.apply(x.to(dtype), self)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias.to(dtype)

    def extra_repr(self) -> str:
        """Say what it is."""
        return f"in_features={self.in_features}, out_features={self.out_features}, kind={self.kind}"


class _Product(torch.autograd.Function):
    """x·Wᵀ that keeps nothing for the backward pass but the bits."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, held: Held) -> torch.Tensor:
        """Return [..., out] of x [..., in]."""
        ctx.held = held
        return linear(x, held.made(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        """Return the gradient [..., in] of x, of that [..., out] of the product."""
        return gradient @ ctx.held.made(gradient.dtype), None


def int8_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (int8 [out, in], fp32 scales [out]) of a weight [out, in]."""
    scale = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    bits = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    rows = max(1, AT_ONCE // weight.shape[1])
    for start in range(0, len(weight), rows):
        part = weight[start : start + rows].float()
        largest = part.abs().amax(dim=1).clamp(min=1e-12) / 127
        scale[start : start + rows] = largest
        bits[start : start + rows] = (part / largest[:, None]).round_()
    return bits, scale


def nf4_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (two numbers of values in each uint8 [N / 2], fp32 magnitudes [N / 64]) of a weight; N is padded."""
    flat = weight.reshape(-1).float()
    padded = -(-flat.numel() // BLOCK) * BLOCK
    bits = torch.empty(padded // 2, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(padded // BLOCK, dtype=torch.float32, device=weight.device)
    values = torch.tensor(NF4, device=weight.device)
    middles = (values[1:] + values[:-1]) / 2
    for start in range(0, padded, AT_ONCE):
        part = flat[start : start + AT_ONCE]
        blocks = nn.functional.pad(part, (0, -part.numel() % BLOCK)).view(-1, BLOCK)
        largest = blocks.abs().amax(dim=1).clamp(min=1e-12)
        codes = torch.bucketize(blocks / largest[:, None], middles, out_int32=True).to(torch.uint8).view(-1, 2)
        bits[start // 2 : start // 2 + len(codes)] = codes[:, 0] << 4 | codes[:, 1]
        scale[start // BLOCK : start // BLOCK + len(largest)] = largest
    return bits, scale


def _pairs(device: torch.device) -> torch.Tensor:
    """Return the two values that each of the 256 bytes stands for, [256, 2] fp32."""
    values = torch.tensor(NF4, device=device)
    return torch.stack([values.repeat_interleave(16), values.repeat(16)], dim=1)


def size(rows: int, columns: int, kind: Kind) -> int:
    """Return the bytes that a weight (rows, columns) is held in, with its scales. Pure."""
    if kind == "int8":
        return rows * columns + 4 * rows
    blocks = -(-rows * columns // BLOCK)
    return blocks * BLOCK // 2 + 4 * blocks


def layers(model: nn.Module, kind: Kind) -> list[tuple[str, Any]]:
    """Return the linear layers that can be held in few bits, gpt2's Conv1D among them, by name.

    The output head stays as it is, and so does a weight that several layers share.

    Raises:
        UserError: there is none.
    """
    if not (found := _frozen(model)):
        raise UserError(
            f"model.lora.base: {kind} is for linear layers, and {type(model).__name__} has none that are frozen: leave "
            "base out"
        )
    return found


def hold(model: nn.Module, fill: Fill | None, kind: Kind) -> str:
    """Replace a model's frozen linear layers, in place, one after the other; return what is to be said.

    Args:
        fill: fills in slices of a parameter of a model on the meta device; None: it has its weights.

    Raises:
        UserError: there is no such layer.
    """
    replaced: Counter[str] = Counter()
    before = after = 0
    scratch = torch.empty(0)
    for name, module in layers(model, kind):
        count = module.weight.numel()
        scratch = scratch if scratch.numel() >= count else torch.empty(count)
        made = Held(_linear_weight(module, name, fill, scratch), module.bias, kind)
        model.set_submodule(name, made)
        replaced[name.removesuffix(".base_layer").rpartition(".")[2]] += 1
        before += 4 * count
        after += made.bits.nbytes + made.scale.nbytes
    del scratch
    heap.trim()
    return (
        f"the base is held in {kind} while adapters are trained: {replaced.total()} linear layers "
        f"({counted(replaced)}) take {after / 2**20:,.1f} MiB instead of {before / 2**20:,.1f} in fp32. Losses are "
        "measured on it; whoever loads the adapters puts them on the base as it is (phase evaluate measures that)"
    )


def _frozen(model: nn.Module) -> list[tuple[str, Any]]:
    from transformers.pytorch_utils import Conv1D

    names: Counter[int] = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    of_head = {id(each) for each in head.modules()} if head is not None else set()
    return [
        (name, module)
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, Conv1D)
        and id(module) not in of_head
        and not module.weight.requires_grad
        and names[id(module.weight)] == 1
        and ".original_module" not in name
    ]


def _linear_weight(module: Any, name: str, fill: Fill | None, scratch: torch.Tensor) -> torch.Tensor:
    """Return a layer's weight [out, in] in fp32.

    Args:
        scratch: where it is read to, (N,): fresh memory for each layer would stay with the heap.
    """
    weight = module.weight.detach()
    if fill is not None and weight.is_meta:
        flat = scratch[: weight.numel()]
        fill(f"{name}.weight", 0, flat)
        weight = flat.view(weight.shape)
    return (weight if isinstance(module, nn.Linear) else weight.T).float()
