"""One block of a transformer: attention and two linear layers, normalised before each, beside a residual path."""

from __future__ import annotations

import torch


class AttentionBlock(torch.nn.Module):
    """Maps (B, L, H) to (B, L, H)."""

    def __init__(self, size: int, heads: int, intermediate: int, dropout: float, causal: bool) -> None:
        super().__init__()
        if size % heads:
            raise ValueError(f"hidden_size {size} is no multiple of num_attention_heads {heads}")
        self.heads, self.rate, self.causal = heads, dropout, causal
        self.attention_norm, self.norm = torch.nn.LayerNorm(size), torch.nn.LayerNorm(size)
        self.projections, self.out = torch.nn.Linear(size, 3 * size), torch.nn.Linear(size, size)
        self.up, self.down = torch.nn.Linear(size, intermediate), torch.nn.Linear(intermediate, size)
        self.dropout = torch.nn.Dropout(dropout)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map (B, L, H) to (B, L, H); where it is causal, no place sees a later one."""
        batch, length, size = hidden.shape
        parts = self.projections(self.attention_norm(hidden)).view(batch, length, 3, self.heads, size // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        seen = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, dropout_p=self.rate if self.training else 0.0, is_causal=self.causal
        )
        hidden = hidden + self.dropout(self.out(seen.transpose(1, 2).reshape(batch, length, size)))
        inner = torch.nn.functional.gelu(self.up(self.norm(hidden)))
        return hidden + self.dropout(self.down(inner))
