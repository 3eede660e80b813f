"""Attention over the cache's slots, plugged into transformers' modules through its AttentionInterface.

A step's tokens arrive as one flat row: first one token for each decoding slot, then chunks of prompts. So the linear
layers see no padding, and only attention knows that the tokens belong to different sequences.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "tandem_slots"


@dataclass(frozen=True)
class Segment:
    """A chunk of one prompt: query tokens [offset, offset + count) of the flat row, at `start` in `slot`."""

    slot: int
    offset: int
    start: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.count


@dataclass
class Layout:
    """Which tokens of the flat row attend to what; the same for every layer of one forward pass."""

    lengths: list[int]
    """Tokens in the cache of each decoding slot, the new one included."""
    segments: list[Segment]
    device: torch.device
    dtype: torch.dtype
    _masks: dict[int | None, torch.Tensor | None] = field(default_factory=dict)

    @property
    def decoding(self) -> int:
        return len(self.lengths)

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def decode_mask(self, window: int | None) -> torch.Tensor | None:
        """Return what to add to scores, [slots, 1, 1, longest], or None where every key counts."""
        if window not in self._masks:
            self._masks[window] = self._build_mask(window)
        return self._masks[window]

    def _build_mask(self, window: int | None) -> torch.Tensor | None:
        shortest, longest = min(self.lengths), self.longest
        if shortest == longest and (window is None or longest <= window):
            return None
        ends = torch.tensor(self.lengths, device=self.device)[:, None]
        keys = torch.arange(longest, device=self.device)
        hidden = keys >= ends if window is None else (keys >= ends) | (keys < ends - window)
        return _additive(hidden, self.dtype)[:, None, None]


class UnsupportedAttention(NotImplementedError):
    """The architecture's attention has a term that the slots' attention does not compute."""


def register() -> None:
    """Make the implementation known to transformers under NAME; again does no harm."""
    AttentionInterface.register(NAME, slot_attention)


def slot_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend from the flat row of queries to the slots.

    query is [1, heads, tokens, width]; key and value are the cache's whole buffers
    [slots, kv_heads, max_context, width]. Returns [1, tokens, heads, value width].
    """
    _refuse_unknown_terms(layout, attention_mask, kwargs)
    assert layout is not None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = query.new_empty(query.shape[2], query.shape[1], value.shape[-1])
    if layout.decoding:
        mask = layout.decode_mask(sliding_window)
        _decode(query[0, :, : layout.decoding], key, value, layout.longest, mask, scale, softcap, out)
    for segment in layout.segments:
        _prefill(query, key, value, segment, scale, sliding_window, softcap, out)
    return out[None], None


def _refuse_unknown_terms(layout: Layout | None, mask: torch.Tensor | None, kwargs: dict[str, Any]) -> None:
    if layout is None:
        raise UnsupportedAttention("its modules do not pass keyword arguments on to the attention function")
    if mask is not None:
        raise UnsupportedAttention("it adds a mask of its own to the attention scores")
    for name in ("position_bias", "s_aux"):
        if kwargs.get(name) is not None:
            raise UnsupportedAttention(f"its attention scores have a term `{name}`")


def _decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    longest: int,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    out: torch.Tensor,
) -> None:
    """One query token for each of the first slots.

    The queries of a KV group are the rows of one attention over its keys, so no head is repeated; of the ways tried
    on CPU this reads a strided bf16 cache fastest (a batched matmul copies its operands first).
    """
    heads, slots, width = query.shape
    kv_heads = key.shape[1]
    grouped = query.transpose(0, 1).reshape(slots, kv_heads, heads // kv_heads, width)
    keys, values = key[:slots, :, :longest], value[:slots, :, :longest]
    if softcap is None:
        result = scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale)
    else:
        result = _capped_attention(grouped, keys, values, mask, scale, softcap)
    out[:slots] = result.reshape(slots, heads, -1)


def _prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segment: Segment,
    scale: float,
    window: int | None,
    softcap: float | None,
    out: torch.Tensor,
) -> None:
    """A chunk of one prompt: its tokens see what its slot already holds and, causally, each other."""
    tokens = slice(segment.offset, segment.offset + segment.count)
    queries = query[:, :, tokens]
    keys = key[segment.slot : segment.slot + 1, :, : segment.end]
    values = value[segment.slot : segment.slot + 1, :, : segment.end]
    causal = segment.start == 0 and (window is None or segment.end <= window)
    if softcap is not None:
        groups = queries.shape[1] // keys.shape[1]
        keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
        mask = _additive(~_visible(segment, window, query.device), query.dtype)
        result = _capped_attention(queries, keys, values, mask, scale, softcap)
    else:
        mask = None if causal else _visible(segment, window, query.device)
        shared = queries.shape[1] != keys.shape[1]
        result = scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=shared
        )
    out[tokens] = result[0].transpose(0, 1)


def _visible(segment: Segment, window: int | None, device: torch.device) -> torch.Tensor:
    """Return [count, end]: whether each of the chunk's tokens sees each key of its slot."""
    at = torch.arange(segment.start, segment.end, device=device)[:, None]
    keys = torch.arange(segment.end, device=device)
    return keys <= at if window is None else (keys <= at) & (keys > at - window)


def _additive(hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return what to add to scores: -inf where hidden, else 0."""
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))


def _capped_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """Attention with Gemma 2's soft cap on the scores, which scaled_dot_product_attention does not have."""
    scores = torch.matmul(query, key.transpose(2, 3)).float() * scale
    scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores += mask
    return torch.matmul(torch.softmax(scores, dim=-1).to(value.dtype), value)
