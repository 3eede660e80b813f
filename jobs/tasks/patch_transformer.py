"""A forecaster that reads patches of a series (PatchTST: Nie et al. 2023, arXiv:2211.14730), one series at a time.

Each patch of the context, its values and which of them are there, becomes one token; all tokens see each other, and one
linear layer makes the quantiles of all steps ahead of them. Beside it, a linear autoregression shifts all quantiles of
a step, so that the network need not learn to copy a season (as in LSTNet: Lai et al. 2018, arXiv:1703.07015).
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig

from jobs.tasks.attention_block import AttentionBlock
from jobs.tasks.own_model import OwnModel


class PatchTransformerConfig(PretrainedConfig):
    """context_length, horizon and num_quantiles follow from the task; the others are the job's to set."""

    model_type = "transformer"

    def __init__(
        self,
        context_length: int = 16,
        horizon: int = 1,
        num_quantiles: int = 1,
        patch_length: int = 8,
        hidden_size: int = 64,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 4,
        intermediate_size: int = 128,
        dropout: float = 0.1,
        **kwargs: Any,
    ) -> None:
        self.context_length = context_length
        self.horizon = horizon
        self.num_quantiles = num_quantiles
        self.patch_length = patch_length
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.dropout = dropout
        super().__init__(**kwargs)
        if patch_length < 1:
            raise ValueError(f"patch_length {patch_length} is below 1")


class PatchTransformer(OwnModel):
    """Scaled values (B, C) → quantiles (B, horizon, Q)."""

    config_class = PatchTransformerConfig

    def __init__(self, config: PatchTransformerConfig) -> None:
        super().__init__(config)
        self.patches = -(-config.context_length // config.patch_length)
        self.embed = torch.nn.Linear(2 * config.patch_length, config.hidden_size)
        self.positions = torch.nn.Embedding(self.patches, config.hidden_size)
        self.dropout = torch.nn.Dropout(config.dropout)
        shape = (config.hidden_size, config.num_attention_heads, config.intermediate_size, config.dropout)
        self.blocks = torch.nn.ModuleList(AttentionBlock(*shape, causal=False) for _ in range(config.num_hidden_layers))
        self.norm = torch.nn.LayerNorm(config.hidden_size)
        self.head = torch.nn.Linear(self.patches * config.hidden_size, config.horizon * config.num_quantiles)
        self.autoregression = torch.nn.Linear(config.context_length, config.horizon)
        self.post_init()

    def forward(self, values: torch.Tensor, observed: torch.Tensor, **_: Any) -> torch.Tensor:
        """Forecast.

        Args:
            values: (B, C), scaled, their mean where there is none.
            observed: (B, C), 1 where there is a value.

        Returns:
            Quantiles (B, horizon, Q), scaled.
        """
        config = self.config
        ahead = (self.patches * config.patch_length - config.context_length, 0)
        both = [torch.nn.functional.pad(part, ahead).unflatten(1, (self.patches, -1)) for part in (values, observed)]
        positions = torch.arange(self.patches, device=values.device)
        hidden = self.dropout(self.embed(torch.cat(both, -1)) + self.positions(positions))
        for block in self.blocks:
            hidden = block(hidden)
        found: torch.Tensor = self.head(self.norm(hidden).flatten(1))
        return found.unflatten(1, (config.horizon, config.num_quantiles)) + self.autoregression(values).unsqueeze(-1)
