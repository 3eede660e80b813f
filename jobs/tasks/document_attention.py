"""Causal attention within documents that share a row."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention


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
    mask = None if documents.shape[1] == 1 else _mask(documents)
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and mask is not None:
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=groups > 1 and mask is None,
    )


def _mask(documents: torch.Tensor) -> torch.Tensor:
    """Return which tokens see which, (B, 1, S, S), of documents (B, S)."""
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return same.tril()
