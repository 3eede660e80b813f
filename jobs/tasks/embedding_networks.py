"""Networks that make a vector of an image: `embedding-cnn` and `embedding-vit`, both with a centre per identity.

The centres are ArcFace's weights: a unit vector for each identity of the training data, which the vectors of its
images come to lie around. A loss of triplets leaves them as they were drawn.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional
from transformers import PretrainedConfig

from jobs.tasks.own_model import OwnModel


class EmbeddingCnnConfig(PretrainedConfig):
    """width: channels of the first of `blocks` blocks, each of which doubles them and halves the sides."""

    model_type = "embedding-cnn"

    def __init__(
        self,
        num_channels: int = 1,
        identities: int = 2,
        image_height: int = 8,
        image_width: int = 8,
        width: int = 32,
        blocks: int = 2,
        embedding_size: int = 64,
        **kwargs: Any,
    ) -> None:
        self.num_channels = num_channels
        self.identities = identities
        self.image_height, self.image_width = image_height, image_width
        self.width = width
        self.blocks = blocks
        self.embedding_size = embedding_size
        super().__init__(**kwargs)


class EmbeddingVitConfig(PretrainedConfig):
    """patch_size: sides of the patches that an image is cut into; what is left over at the edges is not seen."""

    model_type = "embedding-vit"

    def __init__(
        self,
        num_channels: int = 1,
        identities: int = 2,
        image_height: int = 8,
        image_width: int = 8,
        patch_size: int = 4,
        hidden_size: int = 64,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
        embedding_size: int = 64,
        dropout: float = 0.1,
        **kwargs: Any,
    ) -> None:
        self.num_channels = num_channels
        self.identities = identities
        self.image_height, self.image_width = image_height, image_width
        self.patch_size = patch_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.embedding_size = embedding_size
        self.dropout = dropout
        super().__init__(**kwargs)


class Centres(torch.nn.Module):
    """A vector for each identity. A module of its own: torchao cannot load a weight whose name has no dot."""

    def __init__(self, identities: int, size: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(identities, size).normal_())

    def forward(self) -> torch.Tensor:
        """Return the vectors (identities, E) fp32, of length 1."""
        return functional.normalize(self.weight.float(), dim=-1)


class EmbeddingModel(OwnModel):
    """pixel_values (B, C, H, W) → vectors (B, E) fp32 of length 1. Deriving classes say what `features` does."""

    main_input_name = "pixel_values"

    def __init__(self, config: Any, features: torch.nn.Module, size: int) -> None:
        super().__init__(config)
        self.features = features
        self.projection = torch.nn.Linear(size, config.embedding_size)
        self.centres = Centres(config.identities, config.embedding_size)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return vectors (B, E) of images (B, C, H, W), and the centres (identities, E), fp32, all of length 1."""
        vectors = self.projection(self.features(pixel_values)).float()
        return functional.normalize(vectors, dim=-1), self.centres()


class EmbeddingCnn(EmbeddingModel):
    """Blocks of two convolutions, and a linear layer on what is left of the image, 2 by 2."""

    config_class = EmbeddingCnnConfig

    def __init__(self, config: EmbeddingCnnConfig) -> None:
        widths = [config.width << index for index in range(config.blocks)]
        blocks = [
            layer
            for before, after in zip([config.num_channels, *widths], widths, strict=False)
            for layer in _block(before, after)
        ]
        features = torch.nn.Sequential(*blocks, torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())
        super().__init__(config, features, 4 * widths[-1])


class EmbeddingVit(EmbeddingModel):
    """A vision transformer (Dosovitskiy et al. 2021), whose vector is the mean of its patches."""

    config_class = EmbeddingVitConfig

    def __init__(self, config: EmbeddingVitConfig) -> None:
        super().__init__(config, _Patches(config), config.hidden_size)


class _Patches(torch.nn.Module):
    def __init__(self, config: EmbeddingVitConfig) -> None:
        super().__init__()
        size, patch = config.hidden_size, config.patch_size
        rows, columns = config.image_height // patch, config.image_width // patch
        if not (rows and columns):
            raise ValueError(
                f"patch_size {patch} is larger than the images, {config.image_height} x {config.image_width}"
            )
        self.patches = torch.nn.Conv2d(config.num_channels, size, patch, patch)
        self.places = torch.nn.Parameter(torch.empty(rows * columns, size).normal_())
        self.layers = torch.nn.Sequential(*(_Layer(config) for _ in range(config.num_hidden_layers)))
        self.norm = torch.nn.LayerNorm(size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the mean patch (B, hidden_size) of images (B, C, H, W)."""
        patches = self.patches(pixel_values).flatten(2).transpose(1, 2) + self.places
        mean: torch.Tensor = self.norm(self.layers(patches)).mean(1)
        return mean


class _Layer(torch.nn.Module):
    """Attention and a feed-forward network, each behind a LayerNorm and added to what came in."""

    def __init__(self, config: EmbeddingVitConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.heads, self.dropout = config.num_attention_heads, config.dropout
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(size) for _ in range(2))
        self.joined, self.out = torch.nn.Linear(size, 3 * size), torch.nn.Linear(size, size)
        self.up, self.down = torch.nn.Linear(size, 4 * size), torch.nn.Linear(4 * size, size)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Return patches (B, P, hidden_size), each of which has seen the others."""
        batch, count, size = patches.shape
        split = self.joined(self.norms[0](patches)).view(batch, count, 3, self.heads, size // self.heads)
        queries, keys, values = split.permute(2, 0, 3, 1, 4)
        seen = (
            functional.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).reshape(batch, count, size)
        )
        patches = patches + functional.dropout(self.out(seen), self.dropout, self.training)
        wide = functional.gelu(self.up(self.norms[1](patches)))
        return patches + functional.dropout(self.down(wide), self.dropout, self.training)


def _block(channels_in: int, channels_out: int) -> list[torch.nn.Module]:
    return [
        torch.nn.Conv2d(channels_in, channels_out, 3, padding=1),
        torch.nn.GroupNorm(math.gcd(8, channels_out), channels_out),
        torch.nn.GELU(),
        torch.nn.Conv2d(channels_out, channels_out, 3, padding=1),
        torch.nn.GroupNorm(math.gcd(8, channels_out), channels_out),
        torch.nn.GELU(),
        torch.nn.MaxPool2d(2),
    ]
