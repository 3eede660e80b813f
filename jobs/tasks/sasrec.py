"""SASRec: causal self-attention over the items that a user has met (Kang and McAuley 2018, arXiv:1808.09781).

As in GPT, each block normalises before attention and before its two linear layers. An item's vector is the same where
it is read and where it is scored.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig

from jobs.tasks.attention_block import AttentionBlock
from jobs.tasks.own_model import OwnModel


class SasRecConfig(PretrainedConfig):
    """num_items and max_positions follow from the data and from task.max_length; the others are the job's to set."""

    model_type = "sasrec"

    def __init__(
        self,
        num_items: int = 2,
        max_positions: int = 50,
        hidden_size: int = 64,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 2,
        intermediate_size: int = 128,
        dropout: float = 0.3,
        **kwargs: Any,
    ) -> None:
        self.num_items = num_items
        self.max_positions = max_positions
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.dropout = dropout
        super().__init__(**kwargs)


class SasRec(OwnModel):
    """Items (B, L), 0 behind a history's end → scores of items at the chosen places."""

    config_class = SasRecConfig

    def __init__(self, config: SasRecConfig) -> None:
        super().__init__(config)
        self.items = torch.nn.Embedding(config.num_items + 1, config.hidden_size, padding_idx=0)
        self.positions = torch.nn.Embedding(config.max_positions, config.hidden_size)
        self.dropout = torch.nn.Dropout(config.dropout)
        shape = (config.hidden_size, config.num_attention_heads, config.intermediate_size, config.dropout)
        self.blocks = torch.nn.ModuleList(AttentionBlock(*shape, causal=True) for _ in range(config.num_hidden_layers))
        self.norm = torch.nn.LayerNorm(config.hidden_size)
        self.post_init()

    def forward(self, inputs: torch.Tensor, where: torch.Tensor, candidates: torch.Tensor, **_: Any) -> torch.Tensor:
        """Score items as what follows; what lies behind the end of a history changes nothing.

        Args:
            inputs: items (B, L) int64, from 1; 0 behind the end.
            where: bool (B, L), the M places behind which an item is asked for.
            candidates: (C,) int64, the items that are scored.

        Returns:
            Scores (M, C).
        """
        positions = torch.arange(inputs.shape[1], device=inputs.device)
        hidden = self.dropout(self.items(inputs) + self.positions(positions))
        for block in self.blocks:
            hidden = block(hidden)
        return self.norm(hidden[where]) @ self.items(candidates).T
