"""The keys and values of rows that decode together: each a hypothesis of some sequence, at a place of its own.

Of a decoder's own tokens they are aligned on the right, so that the new ones of all rows stand in one column; of
sources on the left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

Layer = tuple[torch.Tensor, ...]
"""Keys and values of a layer's own tokens (R, heads, T, D), then those of the sources (R, heads, S, D)."""


@dataclass
class Rows:
    """R rows."""

    layers: list[Layer]
    lengths: list[int]
    """Tokens of each that are in the cache, the one that the decoder begins with among them."""
    sources: list[int]
    """Tokens of each one's source."""

    def __len__(self) -> int:
        return len(self.lengths)

    @classmethod
    def of(cls, cache: Any, lengths: Sequence[int], sources: Sequence[int]) -> Rows:
        """Take over what an EncoderDecoderCache of transformers holds."""
        pairs = zip(cache.self_attention_cache.layers, cache.cross_attention_cache.layers, strict=True)
        return cls([(own.keys, own.values, read.keys, read.values) for own, read in pairs], [*lengths], [*sources])

    def cache(self) -> Any:
        """Return them as transformers takes them."""
        from transformers import DynamicCache, EncoderDecoderCache

        own, read = DynamicCache(), DynamicCache()
        for at, (keys, values, source_keys, source_values) in enumerate(self.layers):
            own.update(keys, values, at)
            read.update(source_keys, source_values, at)
        return EncoderDecoderCache(own, read)

    def own_mask(self) -> torch.Tensor:
        """Return where the next step's row has tokens of its own, the new one included: (R, T + 1) int64."""
        width = self.layers[0][0].shape[2] + 1
        lengths = torch.tensor(self.lengths)[:, None] + 1
        return (torch.arange(width) >= width - lengths).long()

    def source_mask(self) -> torch.Tensor:
        """Return where each row has tokens of its source: (R, S) int64."""
        return (torch.arange(self.layers[0][2].shape[2]) < torch.tensor(self.sources)[:, None]).long()

    def taken(self, indices: Sequence[int]) -> Rows:
        """Return the rows at `indices`, in that order; one may be there twice. No wider than these need."""
        if list(indices) == list(range(len(self))):
            return self
        lengths, sources = [self.lengths[i] for i in indices], [self.sources[i] for i in indices]
        own, read = slice(-max(lengths, default=1), None), slice(max(sources, default=1))
        at = torch.tensor(indices, dtype=torch.long, device=self.layers[0][0].device)
        layers = [
            tuple(
                part.index_select(0, at)[:, :, keep] for part, keep in zip(layer, (own, own, read, read), strict=True)
            )
            for layer in self.layers
        ]
        return Rows(layers, lengths, sources)


def joined(parts: Sequence[Rows]) -> Rows:
    """Put rows under each other."""
    parts = [part for part in parts if len(part)]
    if len(parts) == 1:
        return parts[0]
    layers = [
        tuple(_stacked([layer[i] for layer in each], left=i < 2) for i in range(4))
        for each in zip(*(part.layers for part in parts), strict=True)
    ]
    lengths = [length for part in parts for length in part.lengths]
    return Rows(layers, lengths, [length for part in parts for length in part.sources])


def _stacked(parts: Sequence[torch.Tensor], left: bool) -> torch.Tensor:
    """Stack (R_i, heads, T_i, D), each filled up to the longest T on the left, or on the right."""
    width = max(part.shape[2] for part in parts)
    fills = (width - part.shape[2] for part in parts)
    filled = [
        torch.nn.functional.pad(part, (0, 0, fill, 0) if left else (0, 0, 0, fill))
        for part, fill in zip(parts, fills, strict=True)
    ]
    return torch.cat(filled)
