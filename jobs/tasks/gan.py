"""Task `gan`: new images in the manner of those of the training data, from noise.

Rows: pixels (N, H, W, C) uint8, latents (N, L) fp32, the noise of the image that this one is measured beside, targets
(N,) int32, all ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field

from jobs.tasks import Batch, Better, Columns, TaskError, TaskOptions
from jobs.tasks.finite import finite
from jobs.tasks.image_task import ImageOptions, ImageTask, PixelFindings, on_device
from jobs.tasks.images import bits_of, counts, read_picture
from jobs.tasks.own_networks import OwnNetworks

if TYPE_CHECKING:
    import torch


LATENT_SIZE = 64


class GanOptions(ImageOptions):
    """How images become pixels, and how the generator and the discriminator learn."""

    latent_size: int | None = Field(None, gt=0, le=4096)
    """An image is made of so many numbers. Left out: 64, or as many as the model that the job starts from has."""
    r1: float = Field(0.5, ge=0)
    """Weight of the discriminator's squared steepness at the images (R1), which keeps the two in balance."""
    flip: bool = False
    """Every second image is mirrored, left to right, in training."""


class Gan(OwnNetworks, ImageTask):
    """An image for each seed, of the kind of those it has learned from; the same seed gives the same image,
    but for the rounding of its pixels.

    Nothing is asked of it but the seed: it makes no image to order. Images may come to look like those of the training
    data. The Fréchet distance is by an embedding of Tandem's own: it compares runs on the same data.
    """

    name: ClassVar[str] = "gan"
    Options: ClassVar[type[TaskOptions]] = GanOptions
    metrics: ClassVar[Mapping[str, Better]] = {"loss": "min", "frechet_distance": "min"}
    gathered: ClassVar[tuple[str, ...]] = ("seen", "made", "sample")
    networks: ClassVar[Mapping[str, str]] = {"gan-cnn": "jobs.tasks.gan_networks:GanCnn"}

    options: GanOptions

    def __init__(self, options: TaskOptions | Mapping[str, Any] | None = None) -> None:
        super().__init__(options)
        self.latent_size: int = self.options.latent_size or LATENT_SIZE

    # -- data -------------------------------------------------------------------------------------------------------

    def check(self, example: Mapping[str, Any]) -> None:
        """Raise TaskError for an example without an image."""
        self._image(example)

    def unused(self, example: Mapping[str, Any]) -> list[str]:
        """Return the columns that are not the image."""
        return [key for key, value in example.items() if key != self.options.image_column and value is not None]

    def observe(self, examples: Sequence[Mapping[str, Any]]) -> PixelFindings:
        """Note the first image's size and channels."""
        return PixelFindings.of([read_picture(self._image(each)).pixels for each in examples], self.options)

    def fit(self, findings: PixelFindings) -> list[str]:
        """Take the size and the channels of the first image, where they are not asked for; images have 8 bits."""
        said = self._learn_pixels(findings)
        if self.bits == 16:
            self.bits, said[-1] = 8, "images of 16 bits are rounded to 8: generated ones have no more"
        return said

    def inherit(self, parent: Any) -> bool:
        """Keep what the parent learned; a latent_size of another value is refused."""
        asked = self.options.latent_size
        super().inherit(parent)
        if asked not in (None, self.latent_size):
            raise TaskError(f"task.latent_size is {asked}, but the model it starts from has {self.latent_size}")
        return True

    def encode(self, examples: Sequence[Mapping[str, Any]]) -> Columns:
        """Resize to the fitted size, pixels (N, H, W, C) uint8; draw latents (N, L) by each image's content."""
        pictures = [read_picture(self._image(example)) for example in examples]
        pixels = self._pixels(pictures)
        return {
            "pixels": pixels,
            "latents": np.stack([self._latents(_number_of(image)) for image in pixels]),
            "targets": np.ones(len(pixels), dtype=np.int32),
            **counts(pictures, self.size, self.channels, self.bits),
        }

    def collate(self, rows: Columns) -> Batch:
        """Return pixel_values (B, C, H, W), -1 to 1, and latents (B, L), fp32.

        Args:
            rows: pixels (B, H, W, C) uint8 and latents (B, L) fp32.
        """
        import torch

        pixels = torch.from_numpy(rows["pixels"].astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2).contiguous()
        return {"pixel_values": pixels, "latents": torch.from_numpy(rows["latents"].copy())}

    # -- model ------------------------------------------------------------------------------------------------------

    def known(self) -> dict[str, Any]:
        """Return the images' channels and size, and the number of latents."""
        return self._decided(self.channels, self.size)

    def placeholders(self) -> dict[str, Any]:
        """Return the same for images that are not known yet."""
        side = self.options.image_size or 32
        return self._decided(self.options.channels or 1, (side, side))

    # -- learning ---------------------------------------------------------------------------------------------------

    def loss(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum the discriminator's loss over the images, a scalar fp32 in nats; and their number, a scalar int64.

        It is the logistic loss of telling each image from a generated one, of noise that is drawn anew in training, and
        R1; the reversal in the model makes of the same gradients those of the generator's non-saturating loss.

        Args:
            batch: as `collate` makes it.
        """
        import torch

        from jobs.tasks.augmentation import AugmentationOptions, augmented
        from jobs.tasks.gan_networks import NEARBY, adversarial, penalty

        pixels, latents = batch["pixel_values"], batch["latents"]
        count = torch.full((), len(pixels), device=pixels.device)
        if not model.training:
            of_images, of_made, *_ = self._told(model, pixels, latents)
            return adversarial(of_images, of_made).sum(), count
        pixels = augmented(pixels, AugmentationOptions(flip=self.options.flip))
        nearby = pixels + NEARBY * torch.randn_like(pixels) if self.options.r1 else None
        of_images, of_made, _, of_nearby = self._told(model, pixels, torch.randn_like(latents), nearby)
        each = adversarial(of_images, of_made)
        if of_nearby is not None:
            each = each + self.options.r1 / 2 * penalty(of_images, of_nearby)
        return each.sum(), count

    def measure(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """Return the sums loss and targets (), and row by row: seen and made (B, F), sample (B, H, W, C) uint8.

        seen and made are embeddings of the images, and of as many generated of the latents in the rows; sample are
        these.
        """
        import torch

        from jobs.tasks import frechet
        from jobs.tasks.gan_networks import adversarial

        of_images, of_made, made, _ = self._told(model, batch["pixel_values"], batch["latents"])
        return {
            "loss": adversarial(of_images, of_made).sum(),
            "targets": torch.full((), len(made), device=made.device),
            "seen": frechet.features(batch["pixel_values"]),
            "made": frechet.features(made),
            "sample": _as_pixels(made),
        }

    def summarise(self, sums: Mapping[str, Any]) -> dict[str, float]:
        """Return the discriminator's loss (nats per pair; 2 ln 2 where it tells nothing apart) and frechet_distance.

        One image has no deviation, so of one there is no distance.
        """
        from jobs.tasks import frechet

        loss = {"loss": sums["loss"] / max(sums["targets"], 1)}
        if len(sums["seen"]) < 2:
            return loss
        return {**loss, "frechet_distance": frechet.distance(sums["seen"], sums["made"])}

    def verdict(self, metrics: Mapping[str, float]) -> list[str]:
        """Say where there is no distance."""
        if not metrics or "frechet_distance" in metrics:
            return []
        return [
            "frechet_distance is not measured: it takes two held-out images, and says little of fewer than some dozens"
        ]

    def figures(self, sums: Mapping[str, Any]) -> dict[str, bytes]:
        """Draw generated images."""
        from jobs.tasks import frechet

        return {"samples.png": frechet.picture(sums["sample"])}

    # -- use --------------------------------------------------------------------------------------------------------

    def instance(self, example: Mapping[str, Any]) -> Any:
        """Return the example's seed, a whole number in the column `seed`, or its digits, which is all that CSV has."""
        if "seed" not in example:
            raise TaskError(f"an image is made of a seed, and the example has no column 'seed', but {sorted(example)}")
        seed = example["seed"]
        return int(seed) if isinstance(seed, str) and seed.strip().isascii() and seed.strip().isdecimal() else seed

    def predict(self, model: torch.nn.Module, instances: Sequence[Any]) -> list[dict[str, Any]]:
        """Make an image, the bytes of a PNG file, of each seed.

        Raises:
            TaskError: a seed is no whole number of 0 or more.
        """
        import torch

        from jobs.tasks import frechet

        latents = torch.from_numpy(np.stack([self._latents(_seed(instance)) for instance in instances]))
        with torch.inference_mode():
            made = _as_pixels(finite(model.generate(on_device(latents, model))))  # type: ignore[operator]
        return [{"image": frechet.png(image)} for image in made.cpu().numpy()]

    def inputs(self) -> list[dict[str, Any]]:
        """Describe the seed."""
        return [{"name": "seed", "datatype": "INT64", "shape": [-1]}]

    def outputs(self) -> list[dict[str, Any]]:
        """Describe the image, the bytes of a PNG file."""
        if self.answers_otherwise(Gan):
            return []
        return [{"name": "image", "datatype": "BYTES", "shape": [-1], "parameters": {"content_type": "base64"}}]

    # -- inside -----------------------------------------------------------------------------------------------------

    def _decided(self, channels: int, size: tuple[int, int]) -> dict[str, Any]:
        known = {"num_channels": channels, "image_height": size[0], "image_width": size[1]}
        return {**known, "latent_size": self.latent_size}

    def _told(
        self, model: torch.nn.Module, pixels: torch.Tensor, latents: torch.Tensor, nearby: torch.Tensor | None = None
    ) -> Any:
        """Return what `GanCnn.forward` does."""
        more = {} if nearby is None else {"nearby": on_device(nearby, model)}
        return model(pixel_values=on_device(pixels, model), latents=on_device(latents, model), **more)

    def _latents(self, seed: int) -> np.ndarray:
        """Return the numbers (L,) fp32 that a seed stands for, from a normal distribution."""
        draw = np.random.Generator(np.random.PCG64(seed))
        return draw.standard_normal(self.latent_size).astype(np.float32)

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "latent_size": self.latent_size}

    def _take(self, settings: Mapping[str, Any]) -> None:
        super()._take(settings)
        self.latent_size = settings["latent_size"]


def _number_of(pixels: np.ndarray) -> int:
    """Return 64 bits of an image's content."""
    assert bits_of(pixels) == 8
    return int.from_bytes(hashlib.blake2b(pixels.tobytes(), digest_size=8).digest(), "little")


def _seed(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
        raise TaskError(f"a seed is a whole number of 0 or more, not {value!r:.40}")
    return int(value)


def _as_pixels(made: torch.Tensor) -> torch.Tensor:
    """Return images (B, C, H, W), -1 to 1, as uint8 (B, H, W, C)."""
    return ((made.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).contiguous()
