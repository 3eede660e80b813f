"""Causal attention within documents that share a row, without a mask of S x S.

Which tokens see each other is told by the number of each token's document. On a CPU each document's attention is
computed on its own, by the kernel that torch takes for a row of one document; on a GPU in bf16 by torch's attention of
sequences of different lengths. What is left (fp32 on a GPU, attention with dropout) takes a mask.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from jobs.tasks.torch_internals import flash_on_cpu, flash_on_cpu_backward

_NAME = "tandem::document_attention"


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: torch.Tensor,
    *,
    dropout: float = 0.0,
    scale: float | None = None,
) -> torch.Tensor:
    """Return what each token makes of those before it in its document: (B, H, S, V).

    Args:
        query: (B, H, S, D).
        key, value: (B, G, S, D) and (B, G, S, V); H is a multiple of G.
        documents: the number of each token's document, (B, S) int32; (B, 1) where a row is one document.
        dropout: share of the attention's weights that is dropped.
        scale: what products are multiplied by; None: 1 / √D.
    """
    groups = query.shape[1] // key.shape[1]
    if documents.shape[1] == 1:
        return scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=groups > 1
        )
    if groups > 1:
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast some are in another type
    alike = not dropout and query.shape == key.shape == value.shape
    if alike and query.device.type == "cpu":
        made: torch.Tensor = ON_CPU(query, key, value, bounds(documents), scale)[0]
        return made
    if alike and query.device.type == "cuda" and _has_lengths(query):
        return _of_lengths(query, key, value, documents, scale)
    return scaled_dot_product_attention(query, key, value, attn_mask=_mask(documents), dropout_p=dropout, scale=scale)


def bounds(documents: torch.Tensor) -> list[int]:
    """Return where documents begin among the tokens of all rows, (B, S), one after another, and at last B S."""
    begins = torch.nn.functional.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    return [*begins.flatten().nonzero()[:, 0].tolist(), documents.numel()]


def _mask(documents: torch.Tensor) -> torch.Tensor:
    """Return which tokens see which, (B, 1, S, S), of documents (B, S)."""
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return same.tril()


def _has_lengths(query: torch.Tensor) -> bool:
    """Say whether flash attention takes queries (B, H, S, D) on this GPU: Ampere or later, up to 256 numbers a head."""
    recent = torch.cuda.get_device_capability(query.device)[0] >= 8
    return recent and query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] <= 256


def _of_lengths(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """Attend by flash attention over sequences of different lengths; all (B, H, S, D). Never run yet: no GPU was there.

    The device is waited for, to know how many documents there are.
    """
    from torch.nn.attention.varlen import varlen_attn

    rows, _, length, _ = query.shape
    ends = torch.tensor(bounds(documents), dtype=torch.int32, device=query.device)
    flat = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
    made = varlen_attn(*flat, ends, ends, length, length, scale=scale, window_size=(-1, 0))
    assert isinstance(made, torch.Tensor)
    return made.unflatten(0, (rows, length)).transpose(1, 2)


def _pieces(bounds: Sequence[int], length: int) -> Iterator[tuple[slice, slice]]:
    """Yield of each document its row and its places in it; rows are `length` tokens long."""
    for start, end in itertools.pairwise(bounds):
        row, at = divmod(start, length)
        yield slice(row, row + 1), slice(at, at + end - start)


@torch.library.custom_op(
    _NAME,
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, int[] bounds, float? scale) -> (Tensor, Tensor)",
)
def _blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: Sequence[int], scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what tokens make of each other, and the logarithms of their weights' sums: (B, H, S, D), (B, H, S)."""
    made = torch.empty_like(query)
    sums = query.new_empty(query.shape[:3], dtype=torch.float32)
    for row, at in _pieces(bounds, query.shape[2]):
        found, logarithms = flash_on_cpu(query[row, :, at], key[row, :, at], value[row, :, at], scale)
        made[row, :, at], sums[row, :, at] = found, logarithms
    return made, sums


@torch.library.custom_op(
    f"{_NAME}_backward",
    mutates_args=(),
    schema="(Tensor gradient, Tensor query, Tensor key, Tensor value, Tensor made, Tensor sums, int[] bounds, "
    "float? scale) -> (Tensor, Tensor, Tensor)",
)
def _blocks_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    made: torch.Tensor,
    sums: torch.Tensor,
    bounds: Sequence[int],
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key and value, (B, H, S, D), from that of what was made of them."""
    of_each = [torch.empty_like(tensor) for tensor in (query, key, value)]
    given = (gradient, query, key, value, made, sums)
    for row, at in _pieces(bounds, query.shape[2]):
        found = flash_on_cpu_backward(*(tensor[row, :, at] for tensor in given), scale=scale)
        for whole, piece in zip(of_each, found, strict=True):
            whole[row, :, at] = piece
    return of_each[0], of_each[1], of_each[2]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, ctx.bounds, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output)


def _back(ctx: Any, gradient: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    found = ON_CPU_BACKWARD(gradient, *ctx.saved_tensors, ctx.bounds, ctx.scale)
    return (*found, None, None)


_blocks.register_fake(lambda query, *others: (torch.empty_like(query), query.new_empty(query.shape[:3]).float()))
_blocks_backward.register_fake(lambda gradient, *given: tuple(torch.empty_like(tensor) for tensor in given[:3]))
_blocks.register_autograd(_back, setup_context=_keep)

ON_CPU = torch.ops.tandem.document_attention
"""(query, key, value, bounds, scale); jobs/worker/flops.py counts it."""
ON_CPU_BACKWARD = torch.ops.tandem.document_attention_backward
"""(gradient, query, key, value, …)."""
