"""Keys and values in blocks, as the Cache that transformers' modules write to.

Per layer two tensors [blocks, kv_heads, BLOCK, head_dim], allocated once. Who owns which block is the scheduler's
affair; a step's batch says where each token goes and where each sequence's text lies.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from serve.engines.torch.attention import write_to_blocks
from serve.engines.torch.blocks import BLOCK


@dataclass(frozen=True)
class LayerShape:
    """What one layer keeps for a token."""

    kv_heads: int
    key_width: int
    value_width: int

    @property
    def numbers(self) -> int:
        """Numbers of one token, keys and values."""
        return self.kv_heads * (self.key_width + self.value_width)


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return zeros of the given shape. On CPU their memory is bounded now and taken beside the first steps (pages.py).

    Zeros, because attention multiplies values beyond a text's end by a weight of zero, and 0 * nan is nan.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # A map of its own: torch's zeros are written at once, calloc's where malloc had memory to give back
    size = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # Linux's alone, and a kernel may be built without
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class PagedLayer(CacheLayerMixin):
    """One layer's keys and values."""

    def __init__(self, shape: LayerShape, blocks: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.keys = allocate((blocks, shape.kv_heads, BLOCK, shape.key_width), dtype, device)
        self.values = allocate((blocks, shape.kv_heads, BLOCK, shape.value_width), dtype, device)
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing is left to do."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write a step's keys and values, [1, heads, T, width]; return the buffers, [blocks, heads, BLOCK, width]."""
        write_to_blocks(self.keys, self.values, key_states, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_max_length(self) -> int:
        return -1


class PagedCache(Cache):
    """All layers' blocks."""

    def __init__(self, shapes: list[LayerShape], blocks: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(layers=[PagedLayer(shape, blocks, dtype, device) for shape in shapes])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write to one layer; shapes as for `PagedLayer.update`."""
        keys, values = self.layers[layer_idx].update(key_states, value_states)
        return keys, values

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Keys and values of every layer, [blocks, heads, BLOCK, width] each."""
        return [tensor for layer in self.layers for tensor in (layer.keys, layer.values)]

    @property
    def memory_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


class ShapeProbe(Cache):
    """A cache that keeps nothing and learns each layer's shape from a forward pass."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=PagedLayer)
        self.shapes: list[LayerShape] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Note a layer's shape; return what came, each [1, KV heads, tokens, width]."""
        assert layer_idx == len(self.shapes), "the layers write in their order, once each"
        self.shapes.append(LayerShape(key_states.shape[1], key_states.shape[-1], value_states.shape[-1]))
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0
