"""A generator and a discriminator in one module, `gan-cnn`, with a gradient reversal between them.

The discriminator learns to tell images from generated ones. Backwards from it to the generator, gradients change their
sign, so that what the discriminator would lessen the generator raises: one loss, one optimiser step for both.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch.nn import functional
from transformers import PretrainedConfig

from jobs.tasks.own_model import OwnModel

NEARBY = 0.05
"""Deviation of the noise, of pixels between -1 and 1, by which it is found out how steep the discriminator is."""
SMALLEST = 4
"""Pixels per side, or a little less, that the generator begins with and the discriminator ends with."""


class GanCnnConfig(PretrainedConfig):
    """latent_size: numbers that an image is made of. width: channels at the image's size; twice as many at each half.

    They are eight times as many at most.
    """

    model_type = "gan-cnn"

    def __init__(
        self,
        num_channels: int = 1,
        image_height: int = 8,
        image_width: int = 8,
        latent_size: int = 64,
        width: int = 32,
        **kwargs: Any,
    ) -> None:
        self.num_channels = num_channels
        self.image_height, self.image_width = image_height, image_width
        self.latent_size = latent_size
        self.width = width
        super().__init__(**kwargs)


class GanCnn(OwnModel):
    """pixel_values (B, C, H, W), -1 to 1, and latents (B, latent_size) → what the discriminator says of both."""

    config_class = GanCnnConfig
    main_input_name = "pixel_values"

    def __init__(self, config: GanCnnConfig) -> None:
        super().__init__(config)
        halves = max(1, round(math.log2(min(config.image_height, config.image_width) / SMALLEST)))
        widths = [min(config.width << step, 8 * config.width) for step in range(halves + 1)]
        self.start = [-(-side // 2**halves) for side in (config.image_height, config.image_width)]
        area = self.start[0] * self.start[1]
        self.seed = torch.nn.Linear(config.latent_size, widths[-1] * area)
        self.grown = torch.nn.Sequential(
            *(layer for low, high in itertools.pairwise(widths[::-1]) for layer in _grow(low, high))
        )
        self.painted = torch.nn.Conv2d(widths[0], config.num_channels, 3, padding=1)
        self.seen = torch.nn.Sequential(
            torch.nn.Conv2d(config.num_channels, widths[0], 3, padding=1),
            torch.nn.LeakyReLU(0.2),
            *(layer for low, high in itertools.pairwise(widths) for layer in _shrink(low, high)),
            torch.nn.Flatten(),
        )
        self.verdict = torch.nn.Linear(widths[-1] * area, 1)
        self.post_init()

    def forward(
        self, pixel_values: torch.Tensor, latents: torch.Tensor, nearby: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Look at images, and make others.

        Args:
            pixel_values: (B, C, H, W), -1 to 1. latents: (B, latent_size). nearby: the images, a little changed.

        Returns:
            logits (B,) of the images, and of as many generated ones; these, (B, C, H, W); logits (B,) of those nearby.
        """
        made = self.generate(latents)
        held = Verdicts()
        of_made = self.discriminate(Reversal.apply(made, held))  # type: ignore[no-untyped-call]
        held.logits = of_made.detach()
        of_nearby = None if nearby is None else self.discriminate(nearby)
        return self.discriminate(pixel_values), of_made, made, of_nearby

    def generate(self, latents: torch.Tensor) -> torch.Tensor:
        """Return images (B, C, H, W), -1 to 1, of latents (B, latent_size)."""
        seed = self.seed(latents).view(len(latents), -1, *self.start)
        made: torch.Tensor = self.painted(self.grown(seed)).tanh()
        return made[:, :, : self.config.image_height, : self.config.image_width]

    def discriminate(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return logits (B,) fp32 of images (B, C, H, W) being real."""
        logits: torch.Tensor = self.verdict(self.seen(pixels)).float()[:, 0]
        return logits


class Verdicts:
    """The discriminator's logits of generated images, which the reversal needs on the way back."""

    logits: torch.Tensor


class Reversal(torch.autograd.Function):
    """Pass images on; backwards, turn each image's gradient round and weigh it by exp(-logit).

    With the sign alone the generator would lessen log(1 - sigmoid(logit)), whose gradient vanishes while the
    discriminator is sure. sigmoid(logit) · exp(-logit) = sigmoid(-logit): so weighed, it is exactly the gradient of the
    non-saturating loss, -log(sigmoid(logit)) (Goodfellow et al. 2014, section 3).
    """

    @staticmethod
    def forward(ctx: Any, images: torch.Tensor, held: Verdicts) -> torch.Tensor:
        """Return the images (B, C, H, W)."""
        ctx.held = held
        return images.view_as(images)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return the gradient (B, C, H, W) of the non-saturating loss for the generator."""
        (gradient,) = gradients
        weights = (-ctx.held.logits.clamp(-30, 30)).exp()
        return -gradient * weights[:, None, None, None].to(gradient.dtype), None


def penalty(of_images: torch.Tensor, of_nearby: torch.Tensor) -> torch.Tensor:
    """Return how steep the discriminator is at each image, (B,): on average the squared norm of its gradient there.

    R1 (Mescheder et al. 2018, arXiv:1801.04406, equation 9) is half of that. It is estimated by the difference of the
    logits of an image and of the same one with noise of the deviation NEARBY (as Lin et al. 2025, arXiv:2501.08316):
    the gradient itself takes a second backward pass, within which DeepSpeed would begin to reduce gradients.

    Args:
        of_images, of_nearby: logits (B,).
    """
    return ((of_nearby - of_images) / NEARBY).square()


def adversarial(of_images: torch.Tensor, of_made: torch.Tensor) -> torch.Tensor:
    """Return the logistic loss of pairs of an image and a generated one, (B,): 2 ln 2 where nothing is told apart."""
    return functional.softplus(-of_images) + functional.softplus(of_made)


def _grow(channels_in: int, channels_out: int) -> list[torch.nn.Module]:
    return [
        torch.nn.Upsample(scale_factor=2, mode="nearest"),
        torch.nn.Conv2d(channels_in, channels_out, 3, padding=1),
        torch.nn.GroupNorm(math.gcd(8, channels_out), channels_out),
        torch.nn.GELU(),
        torch.nn.Conv2d(channels_out, channels_out, 3, padding=1),
        torch.nn.GroupNorm(math.gcd(8, channels_out), channels_out),
        torch.nn.GELU(),
    ]


def _shrink(channels_in: int, channels_out: int) -> list[torch.nn.Module]:
    return [
        torch.nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1),
        torch.nn.LeakyReLU(0.2),
        torch.nn.Conv2d(channels_out, channels_out, 3, padding=1),
        torch.nn.LeakyReLU(0.2),
    ]
