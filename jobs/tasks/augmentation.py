"""Images of a training step, changed at random: moved, turned, zoomed, mirrored, with a piece missing, mixed.

All is drawn from torch's global random state, which the loop seeds for each step and rank, so that a resumed run draws
what an unbroken one would. What is measured and served is never changed.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pydantic import Field

from jobs.tasks import TaskOptions

if TYPE_CHECKING:
    import torch


class AugmentationOptions(TaskOptions):
    """How images are changed at random while they are trained on. All off by default."""

    shift: float = Field(0.0, ge=0, lt=1)
    """Images are moved by up to this share of their sides in training; what comes in repeats the edge."""
    rotate: float = Field(0.0, ge=0, le=180)
    """Images are turned by up to so many degrees in training."""
    zoom: float = Field(0.0, ge=0, lt=1)
    """Images become larger or smaller by up to this share in training; with `shift`, they are cropped at random."""
    flip: bool = False
    """Every second image is mirrored, left to right, in training. Not for letters and digits."""
    erase: float = Field(0.0, ge=0, le=1)
    """With this probability a piece of an image, of 2 to 20 % of it, becomes its mean colour (Zhong et al. 2017)."""


def augmented(pixels: torch.Tensor, options: AugmentationOptions) -> torch.Tensor:
    """Change images (B, C, H, W), normalised, each at random; the same shape and dtype."""
    if options.shift or options.rotate or options.zoom:
        pixels = _moved(pixels, options)
    if options.flip:
        pixels = _mirrored(pixels)
    return _erased(pixels, options.erase) if options.erase else pixels


def _uniform(count: int, most: float, like: torch.Tensor) -> torch.Tensor:
    """Draw numbers (count,) between -most and most."""
    import torch

    return (2 * torch.rand(count, device=like.device) - 1) * most


def _moved(pixels: torch.Tensor, options: AugmentationOptions) -> torch.Tensor:
    """Shift, turn and zoom by one bilinear resampling."""
    import torch

    count, _, height, width = pixels.shape
    angle, larger = _uniform(count, math.radians(options.rotate), pixels), 1 + _uniform(count, options.zoom, pixels)
    across, down = (2 * _uniform(count, options.shift, pixels) for _ in range(2))
    cos, sin = angle.cos() / larger, angle.sin() / larger
    ratio = height / width  # the coordinates of affine_grid run from -1 to 1 along both sides
    rows = [torch.stack([cos, -sin * ratio, across], 1), torch.stack([sin / ratio, cos, down], 1)]
    grid = torch.nn.functional.affine_grid(torch.stack(rows, 1), list(pixels.shape), align_corners=False)
    seen = torch.nn.functional.grid_sample(
        pixels.float(), grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    return seen.to(pixels.dtype)


def _mirrored(pixels: torch.Tensor) -> torch.Tensor:
    import torch

    chosen = torch.rand(len(pixels), device=pixels.device) < 0.5
    return torch.where(chosen[:, None, None, None], pixels.flip(3), pixels)


def _erased(pixels: torch.Tensor, probability: float) -> torch.Tensor:
    """Set a rectangle of some images to 0, the mean: 2 to 20 % of the image, at most three times as long as wide."""
    import torch

    count, _, height, width = pixels.shape
    draw = torch.rand(count, 5, device=pixels.device)
    area, ratio = 0.02 + 0.18 * draw[:, 1], (draw[:, 2] * 2 - 1).mul(math.log(3)).exp()
    tall, wide = ((area * each).sqrt().clamp(max=1) for each in (ratio, 1 / ratio))
    top, left = draw[:, 3] * (1 - tall), draw[:, 4] * (1 - wide)
    rows = (torch.arange(height, device=pixels.device) + 0.5) / height
    columns = (torch.arange(width, device=pixels.device) + 0.5) / width
    inside_rows = (rows >= top[:, None]) & (rows < (top + tall)[:, None])
    inside_columns = (columns >= left[:, None]) & (columns < (left + wide)[:, None])
    gone = inside_rows[:, :, None] & inside_columns[:, None, :] & (draw[:, 0] < probability)[:, None, None]
    return pixels.masked_fill(gone[:, None], 0)


def mixed(pixels: torch.Tensor, alpha: float) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Mix each image (B, C, H, W) with another of the micro-batch: mixup (Zhang et al. 2018, arXiv:1710.09412).

    Returns:
        The mixed images, which one (B,) int64 each was mixed with, and the share of the first, drawn from
        Beta(alpha, alpha) for the micro-batch.
    """
    import torch

    share = float(torch.distributions.Beta(alpha, alpha).sample())
    others = torch.randperm(len(pixels), device=pixels.device)
    return share * pixels + (1 - share) * pixels[others], others, share
