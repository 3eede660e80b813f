"""Task `image-classification`: one label per image, with a small CNN or any transformers image classifier.

Rows: pixels (N, H, W, C) uint8, or uint16 where a training image has 16 bits, label (N,) int32, targets (N,) int32,
all ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from cluster.strict import Text
from jobs.tasks import Batch, Columns, TaskError, TaskOptions
from jobs.tasks.classification import Classifier
from jobs.tasks.image_files import Picture
from jobs.tasks.images import COUNTED, LARGEST, PixelSums, bits_of, counts, deepened, read_picture, resize, sent_picture
from jobs.tasks.labels import check_columns, classified, column_of, kind_of

if TYPE_CHECKING:
    import torch

PREPROCESSING_FILE = "preprocessor_config.json"


class ImageClassificationOptions(TaskOptions):
    """How images become pixels."""

    image_column: Text = "image"
    """The column that holds the image: a folder of folders of images has it."""
    label_column: Text = "label"
    """The column that holds the label."""
    image_size: int | None = Field(None, gt=0, le=65_536)
    """Pixels per side; images of another size are resized. Left out: the size of the first image."""
    channels: Literal[1, 3] | None = None
    """1 for grey, 3 for colour. Left out: as the first image has."""

    @model_validator(mode="after")
    def _columns_differ(self) -> ImageClassificationOptions:
        return check_columns(self, "image_column", "label_column")


@dataclass(frozen=True)
class ImageFindings:
    """What images say, out of one chunk or many."""

    size: tuple[int, int]
    channels: int
    """Size and channels of the first image."""
    labels: frozenset[str]
    sums: Mapping[int, PixelSums] = field(default_factory=dict)
    """By number of channels: until the first image of all is known, each is counted as grey and as colour."""
    bits: int = 8
    """8, or 16 where an image has them."""
    kinds: frozenset[str] = frozenset()
    """What the labels are, in words: text, numbers."""

    def merged(self, later: ImageFindings) -> ImageFindings:
        """Return the findings of both chunks."""
        sums = {channels: self.sums[channels] + later.sums[channels] for channels in self.sums}
        bits = max(self.bits, later.bits)
        kinds = self.kinds | later.kinds
        return ImageFindings(self.size, self.channels, self.labels | later.labels, sums, bits, kinds)


class ImageClassification(Classifier):
    """A small CNN of ours, or any transformers image classifier."""

    name: ClassVar[str] = "image-classification"
    version: ClassVar[int] = 4
    Options: ClassVar[type[TaskOptions]] = ImageClassificationOptions
    unit: ClassVar[str] = "images"
    learned_files: ClassVar[tuple[str, ...]] = (PREPROCESSING_FILE,)
    counted: ClassVar[Mapping[str, str]] = COUNTED

    options: ImageClassificationOptions

    def __init__(self, options: TaskOptions | Mapping[str, Any] | None = None) -> None:
        super().__init__(options)
        self.size: tuple[int, int] = (0, 0)
        self.channels = 0
        self.bits = 8
        self.mean: list[float] = []
        self.std: list[float] = []

    # -- data -------------------------------------------------------------------------------------------------------

    def check(self, example: Mapping[str, Any]) -> None:
        """Raise TaskError for an example without an image or a label."""
        self._image(example)
        self._label(example)

    def content(self, example: Mapping[str, Any]) -> Any:
        """Return the image, whatever its label or its path."""
        there = [path for path in self.files(example) if path.is_file()]
        return there[0].read_bytes() if there else self._image(example)

    def files(self, example: Mapping[str, Any]) -> Sequence[Path]:
        """Return the image's path, where the example names it instead of holding it."""
        image = self._image(example)
        if isinstance(image, Mapping):
            image = image.get("bytes") or image.get("path")
        return [Path(image)] if isinstance(image, str | Path) else []

    def unused(self, example: Mapping[str, Any]) -> list[str]:
        """Return the columns that are neither the image nor the label."""
        read = {self.options.image_column, self.options.label_column}
        return [key for key, value in example.items() if key not in read and value is not None]

    def observe(self, examples: Sequence[Mapping[str, Any]]) -> ImageFindings:
        """Note the labels, the first image's size, and exact sums of all pixels, at the size in which they are seen."""
        side, wanted = self.options.image_size, self.options.channels
        images = [read_picture(self._image(example)).pixels for example in examples]
        sums: dict[int, PixelSums] = {channels: PixelSums() for channels in ((wanted,) if wanted else (1, 3))}
        for image in images:
            size = (side, side) if side else (image.shape[0], image.shape[1])
            sums = {channels: sums[channels] + PixelSums.of(resize(image, size, channels)) for channels in sums}
        labels = frozenset(self._label(example) for example in examples)
        first, bits = images[0].shape, max(map(bits_of, images))
        kinds = frozenset(kind_of(example[self.options.label_column]) for example in examples)
        return ImageFindings((first[0], first[1]), first[2], labels, sums, bits, kinds)

    def fit(self, findings: ImageFindings) -> list[str]:
        """Learn the labels, the size and the mean and deviation of the pixels per channel."""
        of_labels = self._learn_labels(findings.labels, findings.kinds)
        side = self.options.image_size
        self.size = (side, side) if side else findings.size
        self.channels = self.options.channels or (1 if findings.channels == 1 else 3)
        self.bits = findings.bits
        self.mean, self.std = findings.sums[self.channels].mean_and_deviation()
        said = [*of_labels, f"images become {self._form()}"]
        return [*said, *(["images of 16 bits: all pixels are kept as 16 bits, 0 to 65535"] * (self.bits == 16))]

    def inherit(self, parent: Path | str) -> bool:
        """Keep the parent's labels, size and normalisation; options that ask for others are refused."""
        super().inherit(parent)
        side, channels = self.options.image_size, self.options.channels
        if side and (side, side) != self.size:
            raise TaskError(f"task.image_size is {side}, but the model it starts from sees {self.size}: leave it out")
        if channels and channels != self.channels:
            raise TaskError(f"task.channels is {channels}, but the model it starts from has {self.channels}")
        return True

    def save(self, directory: Path) -> None:
        """Write preprocessor_config.json: size, channels, mean, deviation, labels."""
        settings = {
            "size": {"height": self.size[0], "width": self.size[1]},
            "num_channels": self.channels,
            "image_mean": self.mean,
            "image_std": self.std,
            "rescale_factor": 1 / LARGEST[self.bits],
            "labels": self.labels,
        }
        (directory / PREPROCESSING_FILE).write_text(json.dumps(settings, indent=2), encoding="utf-8")

    @classmethod
    def load(cls, directory: Path, options: TaskOptions | Mapping[str, Any] | None = None) -> ImageClassification:
        """Read what `save` wrote."""
        task = cls(options)
        try:
            settings = json.loads((Path(directory) / PREPROCESSING_FILE).read_text(encoding="utf-8"))
            task.size = (settings["size"]["height"], settings["size"]["width"])
            task.channels, task.labels = settings["num_channels"], settings["labels"]
            task.mean, task.std = settings["image_mean"], settings["image_std"]
            task.bits = 16 if settings.get("rescale_factor") == 1 / LARGEST[16] else 8
        except (OSError, KeyError, json.JSONDecodeError) as error:
            raise TaskError(
                f"{directory} holds no image classifier of Tandem: {PREPROCESSING_FILE}: {error}"
            ) from error
        return task

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

    def inputs(self) -> list[dict[str, Any]]:
        """Describe the image tensor, in whose place files may be sent."""
        tensor = {"name": "image", "datatype": f"UINT{self.bits}", "shape": [-1, *self.size, self.channels]}
        return [{**tensor, "parameters": {"content_types": ["np", "base64"]}}]

    def outputs(self) -> list[dict[str, Any]]:
        """Describe label, score and scores."""
        return [] if self.answers_otherwise(ImageClassification) else classified(self.labels)

    # -- inside -----------------------------------------------------------------------------------------------------

    def _image(self, example: Mapping[str, Any]) -> Any:
        return column_of(example, self.options.image_column, "image_column")

    def _form(self) -> str:
        chosen = "as the first one is" if None in (self.options.image_size, self.options.channels) else "as asked for"
        return f"{self.size[0]} x {self.size[1]} pixels, {'grey' if self.channels == 1 else 'in colour'}: {chosen}"

    def _pixels(self, pictures: Sequence[Picture]) -> np.ndarray:
        """Return uint8 or uint16 (B, H, W, C) of the fitted size."""
        resized = (resize(picture.pixels, self.size, self.channels) for picture in pictures)
        return np.stack([deepened(pixels, self.bits) for pixels in resized])

    def _normalise(self, pixels: np.ndarray) -> torch.Tensor:
        """Turn pixels (B, H, W, C) into fp32 (B, C, H, W) of mean 0 and deviation 1 over the training images."""
        import torch

        scaled = torch.from_numpy(pixels.astype(np.float32) / LARGEST[bits_of(pixels)])
        return ((scaled - torch.tensor(self.mean)) / torch.tensor(self.std)).permute(0, 3, 1, 2).contiguous()

    def _logits(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Return logits (B, labels) in fp32."""
        import torch

        parameter = next(model.parameters())
        dtype = parameter.dtype if parameter.dtype.is_floating_point else torch.float32
        return model(pixel_values=batch["pixel_values"].to(parameter.device, dtype)).logits.float()
