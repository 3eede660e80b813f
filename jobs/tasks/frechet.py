"""The Fréchet distance between images and generated ones, on a small embedding that is the same everywhere.

The embedding is what convolutions with fixed random weights make of an image: no network has to be fetched, and its
figures compare with others of images of the same size and number of channels only, not with those of Inception.
"""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
import torch
from torch.nn import functional

FEATURES = 64
SHOWN = 64
"""So many generated images are drawn."""


@lru_cache(maxsize=4)
def _weights(channels: int) -> list[torch.Tensor]:
    """Return three convolutions' weights, drawn by numpy, whose streams do not change."""
    draw = np.random.Generator(np.random.PCG64(2017))
    shapes = [(16, channels, 3, 3), (32, 16, 3, 3), (FEATURES // 2, 32, 3, 3)]
    return [
        torch.from_numpy((draw.standard_normal(shape) * (2 / np.prod(shape[1:])) ** 0.5).astype(np.float32))
        for shape in shapes
    ]


def features(pixels: torch.Tensor) -> torch.Tensor:
    """Return the embedding (B, FEATURES) fp32 of images (B, C, H, W), -1 to 1: means and deviations of 32 maps."""
    seen = pixels.float()
    for number, weight in enumerate(_weights(pixels.shape[1])):
        seen = functional.conv2d(seen, weight.to(seen.device), stride=1 + (number > 0), padding=1)
        seen = functional.leaky_relu(seen, 0.2)
    return torch.cat([seen.mean((2, 3)), seen.var((2, 3), correction=0).clamp(min=1e-12).sqrt()], 1)


def distance(images: np.ndarray, made: np.ndarray) -> float:
    """Return the Fréchet distance between the normal distributions of two sets of embeddings, (N, F) each.

    Heusel et al. 2017 (arXiv:1706.08500), equation 6. With few images it is too large.
    """
    first, second = images.astype(np.float64), made.astype(np.float64)
    apart = ((first.mean(0) - second.mean(0)) ** 2).sum()
    one, other = (np.cov(each, rowvar=False, bias=True) for each in (first, second))
    # The trace of the root of a product of two covariances is that of root(one) other root(one), which is symmetric.
    root = _root(one)
    common = np.sqrt(np.clip(np.linalg.eigvalsh(root @ other @ root), 0, None)).sum()
    return float(max(apart + np.trace(one) + np.trace(other) - 2 * common, 0.0))


def _root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    rooted: np.ndarray = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    return rooted


def picture(images: np.ndarray) -> bytes:
    """Draw the first images, (N, h, w, C) uint8, in a square, as a PNG."""
    count = min(SHOWN, len(images))
    side = int(np.ceil(count**0.5))
    height, width = images.shape[1:3]
    scale = max(1, 64 // max(height, width))
    sheet = np.full((side * (height + 1), side * (width + 1), images.shape[3]), 255, dtype=np.uint8)
    for number, image in enumerate(images[:count]):
        top, left = number // side * (height + 1), number % side * (width + 1)
        sheet[top : top + height, left : left + width] = image
    sheet = np.repeat(np.repeat(sheet, scale, 0), scale, 1)
    return png(sheet)


def png(pixels: np.ndarray) -> bytes:
    """Return pixels (H, W, C) uint8 as the bytes of a PNG file."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(file, "PNG")
    return file.getvalue()
