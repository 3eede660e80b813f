"""A small anchor-free detector, `detection-cnn`: for each cell of 4 by 4 pixels, what is centred there and how large.

In the manner of CenterNet (Zhou et al. 2019, arXiv:1904.07850): convolutions down to 1/16 of the image and up again to
1/4, where one head says per category whether an object's centre is there, and another how far its sides are.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional
from transformers import PretrainedConfig

from jobs.tasks.own_model import OwnModel

STRIDE = 4
"""Pixels per side of a cell."""
PRIOR = 0.02
"""What every centre's probability is before training (Lin et al. 2017, RetinaNet, section 4.1)."""


class DetectionCnnConfig(PretrainedConfig):
    """width: channels at 1/4 of the image's size; twice as many below. blocks: convolutions at each size."""

    model_type = "detection-cnn"

    def __init__(
        self, num_channels: int = 3, categories: int = 1, width: int = 32, blocks: int = 2, **kwargs: Any
    ) -> None:
        self.num_channels = num_channels
        self.categories = categories
        self.width = width
        self.blocks = blocks
        super().__init__(**kwargs)


class DetectionCnn(OwnModel):
    """pixel_values (B, C, H, W) → logits of centres and distances of sides, on a grid of H/4 by W/4 cells."""

    config_class = DetectionCnnConfig
    main_input_name = "pixel_values"

    def __init__(self, config: DetectionCnnConfig) -> None:
        super().__init__(config)
        width, blocks = config.width, config.blocks
        self.fourth = torch.nn.Sequential(
            *_block(config.num_channels, width // 2, 2), *_block(width // 2, width, 2), *_row(width, blocks)
        )
        self.eighth = torch.nn.Sequential(*_block(width, 2 * width, 2), *_row(2 * width, blocks))
        self.sixteenth = torch.nn.Sequential(*_block(2 * width, 2 * width, 2), *_row(2 * width, blocks))
        self.up_eighth = torch.nn.Sequential(*_block(4 * width, 2 * width))
        self.up_fourth = torch.nn.Sequential(*_block(3 * width, width), *_row(width, blocks))
        self.centres = torch.nn.Conv2d(width, config.categories, 1)
        self.sides = torch.nn.Conv2d(width, 4, 1)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Look at images (B, C, H, W).

        Returns:
            logits (B, categories, H/4, W/4) fp32 of an object's centre lying in a cell, and the distances (B, 4, H/4,
            W/4) fp32 from the cell's middle to the object's left, upper, right and lower side, in cells. H/4 and W/4
            are rounded up.
        """
        fourth = self.fourth(pixel_values)
        eighth = self.eighth(fourth)
        sixteenth = self.sixteenth(eighth)
        eighth = self.up_eighth(torch.cat([eighth, _to_size(sixteenth, eighth)], 1))
        fourth = self.up_fourth(torch.cat([fourth, _to_size(eighth, fourth)], 1))
        logits = self.centres(fourth).float() - math.log(1 / PRIOR - 1)
        return logits, functional.softplus(self.sides(fourth).float() + 1)


def _to_size(small: torch.Tensor, large: torch.Tensor) -> torch.Tensor:
    return functional.interpolate(small, size=large.shape[-2:], mode="nearest")


def _row(channels: int, count: int) -> list[torch.nn.Module]:
    return [layer for _ in range(count) for layer in _block(channels, channels)]


def _block(channels_in: int, channels_out: int, stride: int = 1) -> list[torch.nn.Module]:
    return [
        torch.nn.Conv2d(channels_in, channels_out, 3, stride, 1),
        torch.nn.GroupNorm(math.gcd(8, channels_out), channels_out),
        torch.nn.GELU(),
    ]
