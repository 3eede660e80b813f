"""A small convolutional network for control: it keeps where something is, which pooling would lose.

Convolutions of stride 2 until a side has at most 8 places, then two linear layers over all places and channels, after
Mnih et al. 2015 ("Human-level control through deep reinforcement learning").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.modeling_outputs import SequenceClassifierOutput

from jobs.tasks.own_model import OwnModel

SIDE = 8
"""Places along the longer side that the linear layers see at most."""


class PolicyCnnConfig(PretrainedConfig):
    """image: height, width and channels. width: channels of the first layer; hidden_size: of the linear ones."""

    model_type = "policy-cnn"

    def __init__(
        self,
        image: Sequence[int] = (8, 8, 1),
        outputs: int = 1,
        width: int = 16,
        hidden_size: int = 128,
        initializer_range: float = 0.05,
        **kwargs: Any,
    ) -> None:
        self.image, self.outputs, self.initializer_range = list(image), outputs, initializer_range
        self.width, self.hidden_size = width, hidden_size
        super().__init__(**kwargs)


class PolicyCnn(OwnModel):
    """numbers (B, H·W·C) → logits (B, outputs)."""

    config_class = PolicyCnnConfig

    def __init__(self, config: PolicyCnnConfig) -> None:
        super().__init__(config)
        height, width, channels = config.image
        layers: list[torch.nn.Module] = [torch.nn.Conv2d(channels, config.width, 3, padding=1), torch.nn.GELU()]
        channels = config.width
        while max(height, width) > SIDE:
            layers += [torch.nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1), torch.nn.GELU()]
            height, width, channels = (height + 1) // 2, (width + 1) // 2, 2 * channels
        self.features = torch.nn.Sequential(*layers, torch.nn.Flatten())
        self.head = torch.nn.Sequential(
            torch.nn.Linear(height * width * channels, config.hidden_size),
            torch.nn.LayerNorm(config.hidden_size),
            torch.nn.GELU(),
            torch.nn.Linear(config.hidden_size, config.outputs),
        )
        self.post_init()

    def forward(self, numbers: torch.Tensor, **_: Any) -> SequenceClassifierOutput:
        """Answer images (B, H·W·C), row by row and within ±1: logits (B, outputs)."""
        pixels = numbers.view(-1, *self.config.image).permute(0, 3, 1, 2)
        return SequenceClassifierOutput(logits=self.head(self.features(pixels)))
