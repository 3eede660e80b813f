"""Task `image-classification`: one label per image, with a small CNN or any transformers image classifier.

Rows: pixels (N, H, W, C) uint8, label (N,) int32, targets (N,) int32, all ones.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from jobs.tasks import Batch, Columns, TaskError

PREPROCESSING_FILE = "preprocessor_config.json"


class ImageClassification:
    """Options: image_size (pixels, default: that of the first image), channels (1 or 3)."""

    name: ClassVar[str] = "image-classification"
    generates: ClassVar[bool] = False
    unit: ClassVar[str] = "images"

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = dict(options)
        self.labels: list[str] = []
        self.size: tuple[int, int] = (0, 0)
        self.channels = 0
        self.mean: list[float] = []
        self.std: list[float] = []

    # -- data -------------------------------------------------------------------------------------------------------

    def check(self, example: Mapping[str, Any]) -> None:
        """Raise TaskError for an example without an image or a label."""
        _field(example, "image")
        if _field(example, "label") is None:
            raise TaskError("an example has no label")

    def fit(self, examples: Sequence[Mapping[str, Any]]) -> None:
        """Learn the labels, the size and the mean and deviation of the pixels per channel."""
        self.labels = sorted({str(_field(example, "label")) for example in examples}, key=_natural)
        if len(self.labels) < 2:
            raise TaskError(
                f"the training images have {len(self.labels)} label(s) {self.labels}; a classifier needs two"
            )
        first = read_image(_field(examples[0], "image"))
        side = self.options.get("image_size")
        self.size = (side, side) if side else (first.shape[0], first.shape[1])
        self.channels = self.options.get("channels") or first.shape[2]
        sample = self._pixels([example["image"] for example in examples[:2048]]).astype(np.float64) / 255
        self.mean = [float(v) for v in sample.mean(axis=(0, 1, 2))]
        self.std = [float(max(v, 1e-3)) for v in sample.std(axis=(0, 1, 2))]

    def save(self, directory: Path) -> None:
        """Write preprocessor_config.json: size, channels, mean, deviation, labels."""
        settings = {
            "size": {"height": self.size[0], "width": self.size[1]},
            "num_channels": self.channels,
            "image_mean": self.mean,
            "image_std": self.std,
            "rescale_factor": 1 / 255,
            "labels": self.labels,
        }
        (directory / PREPROCESSING_FILE).write_text(json.dumps(settings, indent=2), encoding="utf-8")

    @classmethod
    def load(cls, directory: Path, options: Mapping[str, Any] | None = None) -> ImageClassification:
        """Read what `save` wrote."""
        task = cls(options or {})
        try:
            settings = json.loads((Path(directory) / PREPROCESSING_FILE).read_text(encoding="utf-8"))
            task.size = (settings["size"]["height"], settings["size"]["width"])
            task.channels, task.labels = settings["num_channels"], settings["labels"]
            task.mean, task.std = settings["image_mean"], settings["image_std"]
        except (OSError, KeyError, json.JSONDecodeError) as error:
            raise TaskError(
                f"{directory} holds no image classifier of Tandem: {PREPROCESSING_FILE}: {error}"
            ) from error
        return task

    def encode(self, examples: Sequence[Mapping[str, Any]]) -> Columns:
        """Resize to the fitted size; look labels up."""
        index = {label: i for i, label in enumerate(self.labels)}
        labels = [str(_field(example, "label")) for example in examples]
        unknown = sorted(set(labels) - index.keys())
        if unknown:
            raise TaskError(f"labels {unknown[:5]} are not among the {len(index)} labels of the training data")
        return {
            "pixels": self._pixels([_field(example, "image") for example in examples]),
            "label": np.array([index[label] for label in labels], dtype=np.int32),
            "targets": np.ones(len(labels), dtype=np.int32),
        }

    def collate(self, rows: Columns) -> Batch:
        """Return pixel_values (B, C, H, W) fp32, normalised, and labels (B,) int64."""
        batch = {"pixel_values": self._normalise(rows["pixels"])}
        if "label" in rows:
            batch["labels"] = torch.from_numpy(rows["label"].astype(np.int64))
        return batch

    # -- model ------------------------------------------------------------------------------------------------------

    def build(self, architecture: str, config: Mapping[str, Any]) -> torch.nn.Module:
        """Make `cnn` (ours) or a transformers image classifier (vit, resnet, …) in fp32."""
        from transformers import AutoConfig, AutoModelForImageClassification

        from jobs.tasks import cnn

        cnn.register()
        known = {"num_channels": self.channels, "id2label": dict(enumerate(self.labels))}
        known["label2id"] = {label: i for i, label in enumerate(self.labels)}
        try:
            default = AutoConfig.for_model(architecture)
            if hasattr(default, "image_size"):
                known["image_size"] = self.size[0]
            unknown = [key for key in config if not hasattr(default, key)]
            if unknown:
                raise TaskError(
                    f"model.config: {architecture} has no {unknown[0]!r}; it has {sorted(default.to_dict())}"
                )
            model = AutoModelForImageClassification.from_config(AutoConfig.for_model(architecture, **known, **config))
        except (ValueError, KeyError) as error:
            if isinstance(error, TaskError):
                raise
            raise TaskError(f"model.architecture {architecture!r}: {str(error).splitlines()[0]}") from error
        return model.float()

    def load_model(
        self, directory: Path, dtype: torch.dtype | None = None, config: Mapping[str, Any] | None = None
    ) -> torch.nn.Module:
        """Load a model directory (also one quantised by torchao), in evaluation mode."""
        from transformers import AutoModelForImageClassification

        from jobs.tasks import cnn

        cnn.register()
        try:
            model = AutoModelForImageClassification.from_pretrained(
                str(directory), dtype=dtype or "auto", trust_remote_code=False, **(config or {})
            )
        except (OSError, ValueError) as error:
            raise TaskError(f"cannot load a model from {str(directory)!r}: {str(error).splitlines()[0]}") from error
        return model.eval()

    # -- learning ---------------------------------------------------------------------------------------------------

    def loss(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum the cross-entropy over the images, in fp32."""
        labels = batch["labels"]
        total = torch.nn.functional.cross_entropy(self._logits(model, batch), labels, reduction="sum")
        return total, torch.tensor(len(labels), device=labels.device)

    def measure(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """Sum loss, targets and correct first guesses."""
        logits, labels = self._logits(model, batch), batch["labels"]
        return {
            "loss": torch.nn.functional.cross_entropy(logits, labels, reduction="sum"),
            "targets": torch.tensor(len(labels), device=labels.device),
            "correct": (logits.argmax(-1) == labels).sum(),
        }

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return loss (nats per image) and accuracy."""
        count = max(sums["targets"], 1)
        return {"loss": sums["loss"] / count, "accuracy": sums["correct"] / count}

    # -- use --------------------------------------------------------------------------------------------------------

    def predict(self, model: torch.nn.Module, instances: Sequence[Any]) -> list[dict[str, Any]]:
        """Classify images: arrays (H, W) or (H, W, C) of 0..255, or PNG/JPEG bytes."""
        with torch.inference_mode():
            logits = self._logits(model, {"pixel_values": self._normalise(self._pixels(instances))})
        answers = []
        for row in logits.softmax(-1).tolist():
            best = max(range(len(row)), key=row.__getitem__)
            scores = dict(zip(self.labels, row, strict=True))
            answers.append({"label": self.labels[best], "score": row[best], "scores": scores})
        return answers

    def inputs(self) -> list[dict[str, Any]]:
        """Describe the image tensor."""
        return [{"name": "image", "datatype": "UINT8", "shape": [-1, *self.size, self.channels]}]

    # -- inside -----------------------------------------------------------------------------------------------------

    def _pixels(self, images: Sequence[Any]) -> np.ndarray:
        return np.stack([resize(read_image(image), self.size, self.channels) for image in images])

    def _normalise(self, pixels: np.ndarray) -> torch.Tensor:
        scaled = torch.from_numpy(pixels.astype(np.float32) / 255)
        return ((scaled - torch.tensor(self.mean)) / torch.tensor(self.std)).permute(0, 3, 1, 2).contiguous()

    def _logits(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        parameter = next(model.parameters())
        dtype = parameter.dtype if parameter.dtype.is_floating_point else torch.float32
        return model(pixel_values=batch["pixel_values"].to(parameter.device, dtype)).logits.float()


def read_image(image: Any) -> np.ndarray:
    """Return an image (array, bytes of a file, or path) as uint8 (H, W, C).

    Raises:
        TaskError: no image in a known form.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        if isinstance(image, dict) and "bytes" in image:  # how Hugging Face datasets keep an image in Parquet
            image = image["bytes"] or image["path"]
        if isinstance(image, bytes | str | Path):
            opened = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
            image = np.asarray(opened if opened.mode in ("L", "RGB") else opened.convert("RGB"))
        array = np.asarray(image)
    except (UnidentifiedImageError, OSError) as error:
        raise TaskError(f"cannot read an image: {error}") from error
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.dtype == object:
        raise TaskError(f"an image is an array (H, W) or (H, W, C), this one has the shape {array.shape}")
    return array if array.dtype == np.uint8 else np.clip(np.rint(array), 0, 255).astype(np.uint8)


def resize(pixels: np.ndarray, size: tuple[int, int], channels: int) -> np.ndarray:
    """Bring uint8 (H, W, C) to the given size and number of channels (1 or 3), bilinear."""
    from PIL import Image

    if pixels.shape == (*size, channels):
        return pixels
    mode = {1: "L", 3: "RGB"}.get(channels)
    if mode is None or pixels.shape[2] not in (1, 3):
        raise TaskError(f"images have {pixels.shape[2]} channels and the model {channels}; both must be 1 or 3")
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).convert(mode)
    resized = np.asarray(image.resize((size[1], size[0]), Image.Resampling.BILINEAR))
    return resized[:, :, None] if channels == 1 else resized


def _field(example: Mapping[str, Any], name: str) -> Any:
    if name not in example:
        raise TaskError(f"an example has no {name!r}; it has {sorted(example)}")
    return example[name]


def _natural(label: str) -> tuple[int, int, str]:
    return (0, int(label), "") if label.isdigit() else (1, 0, label)
