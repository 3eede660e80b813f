"""A recurrent forecaster: a GRU reads the context step by step, and its last state becomes the quantiles of all steps.

As in MQ-RNN (Wen et al. 2017, arXiv:1711.11053), with a linear autoregression beside it (LSTNet: Lai et al. 2018).
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig

from jobs.tasks.own_model import OwnModel


class GruForecasterConfig(PretrainedConfig):
    """context_length, horizon and num_quantiles follow from the task; the others are the job's to set."""

    model_type = "gru"

    def __init__(
        self,
        context_length: int = 16,
        horizon: int = 1,
        num_quantiles: int = 1,
        hidden_size: int = 64,
        num_hidden_layers: int = 1,
        dropout: float = 0.1,
        **kwargs: Any,
    ) -> None:
        self.context_length = context_length
        self.horizon = horizon
        self.num_quantiles = num_quantiles
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.dropout = dropout
        super().__init__(**kwargs)


class GruForecaster(OwnModel):
    """Scaled values (B, C) → quantiles (B, horizon, Q)."""

    config_class = GruForecasterConfig

    def __init__(self, config: GruForecasterConfig) -> None:
        super().__init__(config)
        between = config.dropout if config.num_hidden_layers > 1 else 0.0
        self.gru = torch.nn.GRU(2, config.hidden_size, config.num_hidden_layers, batch_first=True, dropout=between)
        self.dropout = torch.nn.Dropout(config.dropout)
        self.hidden = torch.nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.head = torch.nn.Linear(2 * config.hidden_size, config.horizon * config.num_quantiles)
        self.autoregression = torch.nn.Linear(config.context_length, config.horizon)
        self.post_init()

    def forward(self, values: torch.Tensor, observed: torch.Tensor, **_: Any) -> torch.Tensor:
        """Forecast; see PatchTransformer.forward."""
        states, _ = self.gru(torch.stack([values, observed], -1))
        found: torch.Tensor = self.head(torch.nn.functional.gelu(self.hidden(self.dropout(states[:, -1]))))
        return found.unflatten(1, (self.config.horizon, self.config.num_quantiles)) + self.autoregression(
            values
        ).unsqueeze(-1)
