"""A small convolutional classifier in the Hugging Face layout, so that it saves, loads and serves like any other.

Two blocks of convolution, batch-free normalisation (GroupNorm: the same result for any batch and world size), GELU
and pooling, then two linear layers. About 0.1 M parameters at the default width.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageClassification, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput


class CnnConfig(PretrainedConfig):
    """width: channels of the first block; the second has twice as many."""

    model_type = "cnn"

    def __init__(self, num_channels: int = 1, width: int = 32, hidden_size: int = 128, **kwargs: Any) -> None:
        self.num_channels = num_channels
        self.width = width
        self.hidden_size = hidden_size
        super().__init__(**kwargs)


class CnnForImageClassification(PreTrainedModel):
    """pixel_values (B, C, H, W) → logits (B, labels). H and W of 4 or more, whatever the size in training."""

    config_class = CnnConfig
    main_input_name = "pixel_values"

    def __init__(self, config: CnnConfig) -> None:
        super().__init__(config)
        width = config.width
        self.features = torch.nn.Sequential(
            *_block(config.num_channels, width), *_block(width, 2 * width), torch.nn.AdaptiveAvgPool2d(2)
        )
        self.head = torch.nn.Sequential(
            torch.nn.Flatten(),
            torch.nn.Linear(8 * width, config.hidden_size),
            torch.nn.GELU(),
            torch.nn.Linear(config.hidden_size, config.num_labels),
        )
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> ImageClassifierOutput:
        """Classify images (B, C, H, W), fp32: logits (B, labels)."""
        return ImageClassifierOutput(logits=self.head(self.features(pixel_values)))

    def get_input_embeddings(self) -> torch.nn.Module:
        """Return the first layer, as transformers asks for it where it quantises."""
        return self.features[0]

    def _init_weights(self, module: torch.nn.Module) -> None:
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            torch.nn.init.zeros_(module.bias)


def _block(channels_in: int, channels_out: int) -> list[torch.nn.Module]:
    return [
        torch.nn.Conv2d(channels_in, channels_out, 3, padding=1),
        torch.nn.GroupNorm(8, channels_out),
        torch.nn.GELU(),
        torch.nn.MaxPool2d(2),
    ]


def register() -> None:
    """Make `cnn` known to transformers' Auto classes. Safe to call again."""
    AutoConfig.register(CnnConfig.model_type, CnnConfig, exist_ok=True)
    AutoModelForImageClassification.register(CnnConfig, CnnForImageClassification, exist_ok=True)
