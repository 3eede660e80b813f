"""Task `image-classification`: one label per image, with a small CNN or any transformers image classifier.

Rows: pixels (N, H, W, C) uint8, or uint16 where a training image has 16 bits, label (N,) int32, targets (N,) int32,
all ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field, model_validator

from cluster.strict import Text
from jobs.tasks import Batch, Better, Columns, TaskOptions
from jobs.tasks.augmentation import AugmentationOptions, augmented, mixed
from jobs.tasks.classification import Classifier
from jobs.tasks.image_task import ImageOptions, on_device
from jobs.tasks.images import counts, read_picture, sent_picture
from jobs.tasks.labelled_images import ImageFindings, LabelledImages
from jobs.tasks.labels import check_columns, classified

if TYPE_CHECKING:
    import torch


class ImageClassificationOptions(ImageOptions, AugmentationOptions):
    """How images become pixels, and how they are changed at random in training."""

    later: ClassVar[frozenset[str]] = frozenset({*AugmentationOptions.model_fields, "mixup"})

    label_column: Text = "label"
    """The column that holds the label."""
    mixup: float = Field(0.0, ge=0, le=10)
    """In training, images and their labels are mixed in pairs, by shares of Beta(mixup, mixup); 0.2 is usual."""

    @model_validator(mode="after")
    def _columns_differ(self) -> ImageClassificationOptions:
        return check_columns(self, "image_column", "label_column")


class ImageClassification(LabelledImages, Classifier):
    """One label per image, of those that training has seen: it knows no other, and names none of several things.

    A small CNN of ours, or any transformers image classifier.
    """

    name: ClassVar[str] = "image-classification"
    version: ClassVar[int] = 4
    Options: ClassVar[type[TaskOptions]] = ImageClassificationOptions
    metrics: ClassVar[Mapping[str, Better]] = {**Classifier.metrics, "top5_accuracy": "max"}

    options: ImageClassificationOptions

    # -- data -------------------------------------------------------------------------------------------------------

    def fit(self, findings: ImageFindings) -> list[str]:
        """Learn the labels, the size and the mean and deviation of the pixels per channel."""
        said = [*self._learn_labels(findings.labels, findings.kinds), *self._learn_pixels(findings.pixels)]
        return [*said, *self._said_of_mixup()]

    def inherited(self) -> list[str]:
        """Say what mixup depends on."""
        return self._said_of_mixup()

    def encode(self, examples: Sequence[Mapping[str, Any]]) -> Columns:
        """Resize to the fitted size, pixels (N, H, W, C) uint8 or uint16; look labels up, (N,) int32."""
        numbers = self._numbers(examples)
        pictures = [read_picture(self._image(example)) for example in examples]
        return {
            "pixels": self._pixels(pictures),
            "label": numbers,
            "targets": np.ones(len(numbers), dtype=np.int32),
            **counts(pictures, self.size, self.channels, self.bits),
        }

    def collate(self, rows: Columns) -> Batch:
        """Return pixel_values (B, C, H, W) fp32, normalised, and labels (B,) int64.

        Args:
            rows: pixels (B, H, W, C) uint8 or uint16 and label (B,) int32.
        """
        import torch

        batch = {"pixel_values": self._normalise(rows["pixels"])}
        if "label" in rows:
            batch["labels"] = torch.from_numpy(rows["label"].astype(np.int64))
        return batch

    # -- model ------------------------------------------------------------------------------------------------------

    def check_model(self, architecture: str, config: Mapping[str, Any]) -> None:
        """Raise TaskError for an unknown architecture, an entry that its config has not, or what makes no model."""
        from jobs.tasks import image_models

        image_models.check_builds(architecture, config)

    def check_parent(self, directory: Path, config: Mapping[str, Any]) -> None:
        """Raise TaskError for a model that classifies no images, or has no place for an entry of `config`."""
        from jobs.tasks import image_models

        image_models.check_parent(directory, config)

    def build(self, architecture: str, config: Mapping[str, Any]) -> torch.nn.Module:
        """Make `cnn` (ours) or a transformers image classifier (vit, resnet, …) in fp32."""
        from jobs.tasks import image_models

        return image_models.build(architecture, config, self.labels, self.size, self.channels)

    def load_model(
        self, directory: Path, dtype: torch.dtype | None = None, config: Mapping[str, Any] | None = None
    ) -> torch.nn.Module:
        """Load a model directory (also one quantised by torchao), in evaluation mode."""
        from jobs.tasks import image_models

        model, self.said = image_models.load(directory, dtype, config or {})
        return model

    # -- learning ---------------------------------------------------------------------------------------------------

    def loss(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum the cross-entropy over the images: () fp32 nats, and their number () int64.

        Args:
            batch: pixel_values (B, C, H, W), changed at random where the model is in training; labels (B,) int64.
        """
        import torch

        if not model.training:
            return super().loss(model, batch)
        pixels, labels = augmented(batch["pixel_values"], self.options), batch["labels"]
        count = torch.full((), len(labels), device=labels.device)
        if not self.options.mixup:
            return super().loss(model, {"pixel_values": pixels, "labels": labels})[0], count
        pixels, others, share = mixed(pixels, self.options.mixup)
        logits = self._logits(model, {"pixel_values": pixels})
        first, second = (
            torch.nn.functional.cross_entropy(logits, each, reduction="sum") for each in (labels, labels[others])
        )
        return share * first + (1 - share) * second, count

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return loss (nats per image), accuracy, and how often the label is among the five best guesses."""
        top = sums.get("among_five", 0.0) / max(sums["targets"], 1)
        return {**super().summarise(sums), "top5_accuracy": top}

    def _guesses(self, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Count of logits (B, C) fp32 labels (B,) int64 that are the first guess, and those among the best five."""
        best = logits.topk(min(5, logits.shape[1])).indices
        return {**super()._guesses(logits, labels), "among_five": (best == labels[:, None]).any(1).sum()}

    # -- use --------------------------------------------------------------------------------------------------------

    def instance(self, example: Mapping[str, Any]) -> np.ndarray:
        """Return an example's image as pixels (H, W, C), read as in training: a path is opened."""
        return read_picture(self._image(example)).pixels

    def predict(self, model: torch.nn.Module, instances: Sequence[Any]) -> list[dict[str, Any]]:
        """Classify images: arrays (H, W) or (H, W, C) of whole numbers, or the bytes of image files.

        Raises:
            TaskError: anything else; a str is never opened, since it may come from a client.
        """
        import torch

        pixels = self._pixels([sent_picture(instance) for instance in instances])
        with torch.inference_mode():
            return self._answers(self._logits(model, {"pixel_values": self._normalise(pixels)}))

    def outputs(self) -> list[dict[str, Any]]:
        """Describe label, score and scores."""
        return [] if self.answers_otherwise(ImageClassification) else classified(self.labels)

    def rows_meet(self) -> str:
        """Return that mixup mixes images of a micro-batch, where it does."""
        return "task.mixup takes its pairs within a micro-batch" if self.options.mixup else ""

    # -- inside -----------------------------------------------------------------------------------------------------

    def _said_of_mixup(self) -> list[str]:
        if not self.options.mixup:
            return []
        return [
            "mixup takes its pairs within each worker's micro-batch: what is learned depends on its size and on the "
            "number of workers, and where it is one image nothing is mixed"
        ]

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "labels": self.labels}

    def _take(self, settings: Mapping[str, Any]) -> None:
        super()._take(settings)
        self.labels = settings["labels"]

    def _logits(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Return logits (B, labels) in fp32."""
        logits: torch.Tensor = model(pixel_values=on_device(batch["pixel_values"], model)).logits.float()
        return logits
