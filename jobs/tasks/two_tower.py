"""Two towers: a vector of the user, a vector of the item, and their product (Yi et al. 2019).

The user's tower reads the mean of the vectors of the items met so far, and the last one; the item's tower reads the
item's own. Items' vectors do not depend on the user, so that they can be computed once and searched by an index.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig

from jobs.tasks.own_model import OwnModel


class TwoTowerConfig(PretrainedConfig):
    """num_items and max_positions follow from the data and from task.max_length; the others are the job's to set."""

    model_type = "two-tower"

    def __init__(
        self,
        num_items: int = 2,
        max_positions: int = 50,
        hidden_size: int = 64,
        intermediate_size: int = 128,
        dropout: float = 0.2,
        softmax_temperature: float = 0.07,
        **kwargs: Any,
    ) -> None:
        self.num_items = num_items
        self.max_positions = max_positions
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.dropout = dropout
        self.softmax_temperature = softmax_temperature
        super().__init__(**kwargs)
        if not softmax_temperature > 0:
            raise ValueError(f"softmax_temperature {softmax_temperature} is not above 0")


class TwoTower(OwnModel):
    """Items (B, L), 0 behind a history's end → scores of items at the chosen places."""

    config_class = TwoTowerConfig

    def __init__(self, config: TwoTowerConfig) -> None:
        super().__init__(config)
        self.items = torch.nn.Embedding(config.num_items + 1, config.hidden_size, padding_idx=0)
        self.user = _tower(2 * config.hidden_size, config)
        self.item = _tower(config.hidden_size, config)
        self.post_init()

    def forward(self, inputs: torch.Tensor, where: torch.Tensor, candidates: torch.Tensor, **_: Any) -> torch.Tensor:
        """Score items as what follows; see SasRec.forward for the arguments and the scores (M, C)."""
        met = self.items(inputs)
        counts = (inputs > 0).cumsum(1).clamp(min=1).unsqueeze(-1)
        history = torch.cat([met.cumsum(1) / counts, met], -1)
        users = torch.nn.functional.normalize(self.user(history[where]), dim=-1)
        items = torch.nn.functional.normalize(self.item(self.items(candidates)), dim=-1)
        return users @ items.T / self.config.softmax_temperature


def _tower(size: int, config: TwoTowerConfig) -> torch.nn.Sequential:
    return torch.nn.Sequential(
        torch.nn.LayerNorm(size),
        torch.nn.Linear(size, config.intermediate_size),
        torch.nn.GELU(),
        torch.nn.Dropout(config.dropout),
        torch.nn.Linear(config.intermediate_size, config.hidden_size),
    )
