"""Causal attention within documents that share a row, without a mask of S x S.

Which tokens see each other is told by where each document ends in its row. On a CPU each document's attention is
computed on its own: by the kernel that torch takes for a row of one document, or in blocks of queries where weights are
dropped or values are of another width. On a GPU it is torch's attention of sequences of different lengths: flash
attention in bf16, else (fp32, dropout) the memory-efficient one.

Nothing here waits for a GPU: how many documents there are is in the tensors' shapes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from jobs.tasks import attention_in_blocks
from jobs.tasks.attention_in_blocks import Dropped
from jobs.tasks.torch_internals import efficient_of_lengths, flash_on_cpu, flash_on_cpu_backward

_NAME = "tandem::document_attention"


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: torch.Tensor,
    *,
    dropout: float = 0.0,
    scale: float | None = None,
) -> torch.Tensor:
    """Return what each token makes of those before it in its document: (B, H, S, V).

    Args:
        query: (B, H, S, D).
        key, value: (B, G, S, D) and (B, G, S, V); H is a multiple of G.
        ends: where each document of a row ends in it, (B, M) int32: see `ends_of`.
        dropout: share of the attention's weights that is dropped.
        scale: what products are multiplied by; None: 1 / √D.
    """
    groups, on_gpu = query.shape[1] // key.shape[1], query.device.type == "cuda"
    if ends.shape[1] == 1 and (on_gpu or not dropout):
        return scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=groups > 1
        )
    if groups > 1:
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast some are in another type
    if on_gpu:
        return _of_lengths(query, key, value, ends, dropout, scale)
    seed = torch.randint(2**31, (1,)) if dropout else None
    made: torch.Tensor = ON_CPU(query, key, value, ends, scale, dropout, seed)[0]
    return made


def ends_of(positions: torch.Tensor) -> torch.Tensor:
    """Return where each document of a row ends in it, (B, M) int32: one begins where the positions (B, S) restart.

    M is the number of documents in the row that has the most, rounded up to a power of two, so that batches are of few
    shapes; rows with fewer end with S as often as it takes.
    """
    rows, length = positions.shape
    last = torch.nn.functional.pad(positions[:, 1:] != positions[:, :-1] + 1, (0, 1), value=True)
    most = int(last.sum(1).max())
    ends = positions.new_full((rows, 1 << (most - 1).bit_length()), length, dtype=torch.int32)
    row, at = last.nonzero(as_tuple=True)
    ends[row, last.cumsum(1)[row, at] - 1] = (at + 1).int()
    return ends


def bounds(ends: torch.Tensor, length: int) -> torch.Tensor:
    """Return where documents begin among the tokens of all rows, one after another, and at last B S: (B M + 1,) int32.

    Args:
        ends: (B, M) int32; what ends where the one before does is empty.
        length: tokens of a row.
    """
    before = torch.arange(len(ends), dtype=torch.int32, device=ends.device)[:, None] * length
    return torch.nn.functional.pad((ends + before).flatten(), (1, 0))


def _has_flash(query: torch.Tensor) -> bool:
    """Say whether flash attention takes queries (B, H, S, D) on this GPU: Ampere or later, up to 256 numbers a head."""
    recent = torch.cuda.get_device_capability(query.device)[0] >= 8
    return recent and query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] <= 256


def _of_lengths(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: torch.Tensor,
    dropout: float,
    scale: float | None,
) -> torch.Tensor:
    """Attend over sequences of different lengths; (B, H, S, D), ends (B, M). Never run yet: no GPU was there."""
    rows, _, length, _ = query.shape
    begins = bounds(ends, length)
    queries, keys, values = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
    if not dropout and query.shape == value.shape and _has_flash(query):
        from torch.nn.attention.varlen import varlen_attn

        made = varlen_attn(queries, keys, values, begins, begins, length, length, scale=scale, window_size=(-1, 0))
        assert isinstance(made, torch.Tensor)
    else:
        made = efficient_of_lengths(queries, keys, values, begins, length, dropout=dropout, scale=scale)
    return made.unflatten(0, (rows, length)).transpose(1, 2)


def _pieces(ends: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield of each document its row and its places in it; ends (B, M)."""
    for row, of_row in enumerate(ends.tolist()):
        for start, end in itertools.pairwise([0, *of_row]):
            if end > start:
                yield slice(row, row + 1), slice(start, end)


def _room(query: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tensors for what is made of queries and values, (B, H, S, V), and for the logarithms, (B, H, S)."""
    alike = query.shape == value.shape
    made = torch.empty_like(query) if alike else value.new_empty(*query.shape[:3], value.shape[-1])
    return made, query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))


@torch.library.custom_op(
    _NAME,
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor ends, float? scale, float dropout, Tensor? seed) -> "
    "(Tensor, Tensor)",
)
def _documents(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: torch.Tensor,
    scale: float | None,
    dropout: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what tokens make of each other, and the logarithms of their weights' sums: (B, H, S, V), (B, H, S)."""
    made, sums = _room(query, value)
    fused, dropped = not dropout and query.shape == value.shape, Dropped(dropout, seed)
    for row, at in _pieces(ends):
        given = (query[row, :, at], key[row, :, at], value[row, :, at])
        if fused:
            found = flash_on_cpu(*given, scale)
        else:
            with torch.autocast("cpu", enabled=False):  # it is on in the forward pass alone
                found = attention_in_blocks.forward(*given, scale, dropped)
        made[row, :, at], sums[row, :, at] = found
    return made, sums


@torch.library.custom_op(
    f"{_NAME}_backward",
    mutates_args=(),
    schema="(Tensor gradient, Tensor query, Tensor key, Tensor value, Tensor made, Tensor sums, Tensor ends, "
    "float? scale, float dropout, Tensor? seed) -> (Tensor, Tensor, Tensor)",
)
def _documents_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    made: torch.Tensor,
    sums: torch.Tensor,
    ends: torch.Tensor,
    scale: float | None,
    dropout: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key and value, (B, H, S, …), from that of what was made of them."""
    of_each = [torch.empty_like(tensor) for tensor in (query, key, value)]
    fused, dropped = not dropout and query.shape == value.shape, Dropped(dropout, seed)
    for row, at in _pieces(ends):
        given = [tensor[row, :, at] for tensor in (gradient, query, key, value, made, sums)]
        if fused:
            found = flash_on_cpu_backward(*given, scale=scale)
        else:
            with torch.autocast("cpu", enabled=False):
                found = attention_in_blocks.backward(*given, scale=scale, dropped=dropped)
        for whole, piece in zip(of_each, found, strict=True):
            whole[row, :, at] = piece
    return of_each[0], of_each[1], of_each[2]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, ends, ctx.scale, ctx.dropout, seed = inputs
    ctx.save_for_backward(query, key, value, *output, ends, seed)


def _back(ctx: Any, gradient: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    *given, seed = ctx.saved_tensors
    found = ON_CPU_BACKWARD(gradient, *given, ctx.scale, ctx.dropout, seed)
    return (*found, None, None, None, None)


_documents.register_fake(lambda query, key, value, *others: _room(query, value))
_documents_backward.register_fake(lambda gradient, *given: tuple(torch.empty_like(tensor) for tensor in given[:3]))
_documents.register_autograd(_back, setup_context=_keep)

ON_CPU = torch.ops.tandem.document_attention
"""(query, key, value, ends, scale, dropout, seed); jobs/worker/flops.py counts it. A compiler sees it as one."""
ON_CPU_BACKWARD = torch.ops.tandem.document_attention_backward
"""(gradient, query, key, value, …)."""
