"""Attention over the cache's blocks, plugged into transformers' modules through its AttentionInterface.

A step's tokens arrive as one flat row: first one token for each decoding sequence, then chunks of prompts. So the
linear layers see no padding, and only attention knows that the tokens belong to different sequences. It gathers each
sequence's blocks, which copies the text once a layer: the native runner reads them where they lie.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from serve.engines.torch.batch import Batch
from serve.engines.torch.blocks import BLOCK, blocks_for

NAME = "tandem_paged"
GATHERED_BLOCKS = 2048
"""Blocks that a group of decoding sequences may gather, padding included: bounds the copy's memory."""


_step = threading.local()
"""The layout of the forward pass that this thread is in. Not an argument: custom operations take tensors only."""


class UnsupportedAttention(NotImplementedError):
    """The architecture's attention has a term that this one does not compute."""


@dataclass(frozen=True)
class Group:
    """Sequences of one kernel call: rows [offset, offset + queries * sequences) of the flat row.

    Either decoding sequences with one query each, or one sequence with all of its chunk's queries.
    """

    offset: int
    queries: int
    ends: torch.Tensor
    """[sequences]: tokens of each in the cache, the new ones included."""
    blocks: torch.Tensor
    """[sequences, blocks]: int64, as many as the longest has."""

    @property
    def sequences(self) -> int:
        return len(self.ends)


class Layout:
    """Which tokens of the flat row go where and attend to what; the same for every layer of one forward pass."""

    def __init__(self, batch: Batch, device: torch.device) -> None:
        self._slots = batch.slots.to(device).long()
        self._device = device
        self._rows: dict[int, torch.Tensor] = {}
        self._masks: dict[tuple[int, int | None], torch.Tensor | None] = {}
        self.groups = [*_decoding(batch, device), *_prefilling(batch, device)]

    def rows(self, heads: int) -> torch.Tensor:
        """Return where the tokens go in a buffer seen as [blocks * heads * BLOCK, width], token by token."""
        if heads not in self._rows:
            head = torch.arange(heads, device=self._device)
            block, offset = self._slots[:, None] // BLOCK, self._slots[:, None] % BLOCK
            self._rows[heads] = ((block * heads + head) * BLOCK + offset).reshape(-1)
        return self._rows[heads]

    def visible(self, at: int, window: int | None) -> torch.Tensor | None:
        """Return which keys the queries of group `at` see, [sequences, 1, queries, keys]; None where all see all."""
        if (at, window) not in self._masks:
            self._masks[at, window] = self._build_mask(self.groups[at], window)
        return self._masks[at, window]

    def _build_mask(self, group: Group, window: int | None) -> torch.Tensor | None:
        keys = torch.arange(group.blocks.shape[1] * BLOCK, device=self._device)
        queries = torch.arange(-group.queries, 0, device=self._device)
        places = group.ends[:, None, None] + queries[None, :, None]
        seen = keys <= places
        if window is not None:
            seen &= keys > places - window
        return None if bool(seen.all()) else seen[:, None]


@contextmanager
def step(layout: Layout) -> Iterator[None]:
    """Say where the tokens of the forward pass inside go, in this thread."""
    _step.layout = layout
    try:
        yield
    finally:
        del _step.layout


def register() -> None:
    """Make the implementation known to transformers under NAME; again does no harm."""
    AttentionInterface.register(NAME, paged_attention)


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend from the flat row of queries to the blocks.

    query is [1, heads, tokens, width]; key and value are the cache's whole buffers [blocks, kv_heads, BLOCK, width].
    Returns [1, tokens, heads, value width].
    """
    _refuse_unknown_terms(attention_mask, kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # torch.compile cannot look into this: it sees one operation. Outside of it the detour would cost 40 us a layer.
    attend = attend_operation if torch.compiler.is_compiling() else _attend_to_blocks
    return attend(query, key, value, scale, sliding_window, softcap)[None], None


def write_to_blocks(keys: torch.Tensor, values: torch.Tensor, new_keys: torch.Tensor, new_values: torch.Tensor) -> None:
    """Write a step's keys and values [1, kv_heads, tokens, width] to a layer's buffers."""
    write = write_operation if torch.compiler.is_compiling() else _write
    write(keys, values, new_keys, new_values)


def _attend_to_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    layout: Layout = _step.layout
    out = query.new_empty(query.shape[2], query.shape[1], value.shape[-1])
    for at, group in enumerate(layout.groups):
        rows = slice(group.offset, group.offset + group.sequences * group.queries)
        queries = query[0, :, rows].unflatten(1, (group.sequences, group.queries)).transpose(0, 1)
        keys, values = _gather(key, group.blocks), _gather(value, group.blocks)
        result = _attend(queries, keys, values, layout.visible(at, window), scale, softcap)
        out[rows] = result.transpose(1, 2).flatten(0, 1)
    return out


def _write(keys: torch.Tensor, values: torch.Tensor, new_keys: torch.Tensor, new_values: torch.Tensor) -> None:
    rows = _step.layout.rows(keys.shape[1])
    for cache, new in ((keys, new_keys), (values, new_values)):
        token_major = new[0].transpose(0, 1).reshape(-1, new.shape[-1])
        cache.view(-1, cache.shape[-1]).index_copy_(0, rows, token_major.to(cache.dtype))


attend_operation = torch.library.custom_op(
    "tandem::attend_to_blocks",
    _attend_to_blocks,
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, float scale, int? window, float? softcap) -> Tensor",
)
write_operation = torch.library.custom_op(
    "tandem::write_to_blocks",
    _write,
    mutates_args=("keys", "values"),
    schema="(Tensor(a!) keys, Tensor(b!) values, Tensor new_keys, Tensor new_values) -> ()",
)


@attend_operation.register_fake
def _attended_shape(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None, softcap: float | None
) -> torch.Tensor:
    return query.new_empty(query.shape[2], query.shape[1], value.shape[-1])


def _refuse_unknown_terms(mask: torch.Tensor | None, kwargs: dict[str, Any]) -> None:
    if mask is not None:
        raise UnsupportedAttention("it adds a mask of its own to the attention scores")
    for name in ("position_bias", "s_aux"):
        if kwargs.get(name) is not None:
            raise UnsupportedAttention(f"its attention scores have a term `{name}`")


def _decoding(batch: Batch, device: torch.device) -> list[Group]:
    """Group the decoding sequences in their order, as many together as may be gathered at once."""
    blocks = [blocks_for(tokens) for tokens in batch.context[: batch.decoding].tolist()]
    groups, first = [], 0
    while first < len(blocks):
        last, longest = first, blocks[first]
        while last < len(blocks) and (last - first + 1) * max(longest, blocks[last]) <= GATHERED_BLOCKS:
            longest = max(longest, blocks[last])
            last += 1
        last = max(last, first + 1)
        groups.append(_group(batch, first, last, first, 1, longest, device))
        first = last
    return groups


def _prefilling(batch: Batch, device: torch.device) -> list[Group]:
    starts, ends = batch.query_start.tolist(), batch.context.tolist()
    return [
        _group(batch, i, i + 1, starts[i], starts[i + 1] - starts[i], blocks_for(ends[i]), device)
        for i in range(batch.decoding, len(ends))
    ]


def _group(batch: Batch, first: int, last: int, offset: int, queries: int, longest: int, device: torch.device) -> Group:
    ends = batch.context[first:last].to(device).long()
    return Group(offset, queries, ends, batch.blocks[first:last, :longest].to(device).long())


def _gather(cache: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """[blocks, kv_heads, BLOCK, width] → [sequences, kv_heads, keys, width]."""
    _, heads, _, width = cache.shape
    head = torch.arange(heads, device=cache.device)
    at = blocks[:, None, :] * heads + head[:, None]
    gathered = cache.view(-1, BLOCK * width).index_select(0, at.flatten())
    return gathered.view(len(blocks), heads, blocks.shape[1] * BLOCK, width)


def _attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    visible: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """[sequences, heads, queries, width] over [sequences, kv_heads, keys, width].

    The queries of a KV group are rows of one product over its keys, so no head is repeated: on CPU 6 to 11 times
    faster than torch's kernel for one query, which keeps the many queries of a prompt.
    """
    sequences, heads, count, width = queries.shape
    kv_heads = keys.shape[1]
    if count > 1 and softcap is None:
        shared = heads != kv_heads
        return scaled_dot_product_attention(queries, keys, values, visible, scale=scale, enable_gqa=shared)
    grouped = queries.reshape(sequences, kv_heads, -1, width)
    scores = torch.matmul(grouped, keys.transpose(2, 3)).float() * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.view(sequences, kv_heads, -1, count, keys.shape[2])
    if visible is not None:
        scores = scores.masked_fill(~visible[:, :, None], float("-inf"))
    weights = torch.softmax(scores, dim=-1).to(values.dtype).flatten(2, 3)
    return torch.matmul(weights, values).view(sequences, heads, count, -1)
