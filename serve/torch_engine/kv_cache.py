"""Keys and values of every running sequence: one slot of `max_context` tokens each, allocated once per layer.

The slots in use are always the first ones, so that a decode step reads them as one strided view, without a gather.
Who owns which slot is the scheduler's affair; `move` follows when it fills a hole.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, CacheLayerMixin


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values: two tensors [slots, kv_heads, max_context, head_dim]."""

    def __init__(self, slots: int, max_context: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.slots = slots
        self.max_context = max_context
        self.dtype = dtype
        self.rows = torch.empty(0, dtype=torch.long)
        self.flat_keys = self.flat_values = torch.empty(0)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate at the first write, when the architecture has shown its heads and their widths."""
        self.keys = self._allocate(key_states)
        self.values = self._allocate(value_states)
        self.flat_keys = self.keys.view(-1, self.keys.shape[-1])
        self.flat_values = self.values.view(-1, self.values.shape[-1])
        self.is_initialized = True

    def _allocate(self, states: torch.Tensor) -> torch.Tensor:
        shape = (self.slots, states.shape[1], self.max_context, states.shape[-1])
        # zeros, not empty: attention multiplies unwritten values by a weight of zero, and 0 * nan is nan
        if states.device.type != "cpu":
            return torch.zeros(shape, dtype=self.dtype, device=states.device)
        # numpy's zeros come from calloc: the memory is bounded now and taken page by page as tokens arrive
        return torch.from_numpy(np.zeros(math.prod(shape) * self.dtype.itemsize, np.uint8)).view(self.dtype).view(shape)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write [1, kv_heads, tokens, head_dim] to the step's rows; return the whole buffers."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.flat_keys.index_copy_(0, self.rows, _token_major(key_states, self.dtype))
        self.flat_values.index_copy_(0, self.rows, _token_major(value_states, self.dtype))
        return self.keys, self.values

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one slot to another."""
        if self.is_initialized:
            self.keys[target, :, :length] = self.keys[source, :, :length]
            self.values[target, :, :length] = self.values[source, :, :length]

    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_max_length(self) -> int:
        return self.max_context


class SlotCache(Cache):
    """The layers' slots, as the Cache that transformers' modules write to."""

    def __init__(self, slots: int, max_context: int, dtype: torch.dtype) -> None:
        super().__init__(layer_class_to_replicate=lambda: SlotLayer(slots, max_context, dtype))
        self.slots = slots
        self.max_context = max_context
        self._slots = torch.empty(0, dtype=torch.long)
        self._positions = torch.empty(0, dtype=torch.long)
        self._rows_by_heads: dict[int, torch.Tensor] = {}

    def write_at(self, slots: torch.Tensor, positions: torch.Tensor) -> None:
        """Say where the next forward's tokens go: token t to `positions[t]` of slot `slots[t]`, in every layer."""
        self._slots, self._positions = slots, positions
        self._rows_by_heads = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        while len(self.layers) <= layer_idx:
            self.layers.append(self.layer_class_to_replicate())
        layer = self.layers[layer_idx]
        layer.rows = self._rows(key_states.shape[1])
        keys, values = layer.update(key_states, value_states)
        return keys, values

    def _rows(self, heads: int) -> torch.Tensor:
        """Return the rows of a buffer seen as [slots * heads * max_context, head_dim], token by token."""
        if heads not in self._rows_by_heads:
            head = torch.arange(heads, device=self._slots.device)
            rows = (self._slots[:, None] * heads + head) * self.max_context + self._positions[:, None]
            self._rows_by_heads[heads] = rows.reshape(-1)
        return self._rows_by_heads[heads]

    def move(self, source: int, target: int, length: int) -> None:
        for layer in self.layers:
            layer.move(source, target, length)

    @property
    def memory_bytes(self) -> int:
        """The bound on the memory of all layers; constant once every layer has been written to."""
        tensors = [tensor for layer in self.layers for tensor in (layer.keys, layer.values) if tensor is not None]
        return sum(tensor.nbytes for tensor in tensors)


def _token_major(states: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[1, heads, tokens, width] → [tokens * heads, width]."""
    return states[0].transpose(0, 1).reshape(-1, states.shape[-1]).to(dtype)
