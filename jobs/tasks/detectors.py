"""Networks that detect objects: `detection-cnn`, ours, and those of transformers that guess a set, as DETR does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from jobs.tasks import TaskError
from jobs.tasks.image_task import on_device
from jobs.tasks.own_networks import OwnNetworks

if TYPE_CHECKING:
    import torch

TABLE = "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES"
"""The name of transformers' own table of the architectures that detect objects."""
SETS = ("detr", "yolos")
"""Of these, the ones whose guesses have a class for nothing, and which need no package or weights from elsewhere."""


class Seen(Protocol):
    """What a network says of B images."""

    def loss(self, boxes: torch.Tensor, labels: torch.Tensor, crowd: torch.Tensor) -> torch.Tensor:
        """Return the loss of each image (B,), of boxes (B, M, 4), labels (B, M) and crowd (B, M)."""

    def check(self, labels: torch.Tensor, crowd: torch.Tensor) -> None:
        """Raise TaskError where an image to be trained on, labels (B, M), has more objects than can be guessed."""

    def found(self, most: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return boxes (B, K, 4), corners as shares, scores (B, K) and labels (B, K), the best first."""


@dataclass(frozen=True)
class Grid:
    """Centres and distances of sides on a grid of cells."""

    logits: torch.Tensor
    distances: torch.Tensor

    def check(self, labels: torch.Tensor, crowd: torch.Tensor) -> None:
        """Accept any number of objects, of labels and crowd (B, M): there are as many places as cells."""

    def loss(self, boxes: torch.Tensor, labels: torch.Tensor, crowd: torch.Tensor) -> torch.Tensor:
        """Return the loss of each image (B,)."""
        from jobs.tasks import centre_points

        return centre_points.loss(self.logits, self.distances, boxes, labels, crowd)

    def found(self, most: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return boxes (B, K, 4), scores (B, K) and labels (B, K)."""
        from jobs.tasks import centre_points

        return centre_points.found(self.logits, self.distances, most)


@dataclass(frozen=True)
class Guesses:
    """A set of guesses."""

    logits: torch.Tensor
    boxes: torch.Tensor

    def check(self, labels: torch.Tensor, crowd: torch.Tensor) -> None:
        """Raise TaskError where an image, labels (B, M) and crowd (B, M), has more objects than there are guesses."""
        most, guesses = int(((labels >= 0) & ~crowd).sum(1).max()), self.logits.shape[1]
        if most > guesses:
            raise TaskError(
                f"a training image holds {most} objects, and the model makes {guesses} guesses of an image, so some "
                "could never be learned: raise num_queries (detr) or num_detection_tokens (yolos) in model.config, or "
                f"set task.max_objects: {guesses}, which makes such an image a bad row"
            )

    def loss(self, boxes: torch.Tensor, labels: torch.Tensor, crowd: torch.Tensor) -> torch.Tensor:
        """Return the loss of each image (B,)."""
        from jobs.tasks import set_prediction

        return set_prediction.loss(self.logits, self.boxes, boxes, labels, crowd)

    def found(self, most: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return boxes (B, K, 4), scores (B, K) and labels (B, K)."""
        from jobs.tasks import set_prediction

        return set_prediction.found(self.logits, self.boxes, most)


def look(model: torch.nn.Module, pixels: torch.Tensor) -> Seen:
    """Return what a network says of images (B, C, H, W)."""
    seen = model(pixel_values=on_device(pixels, model))
    return Grid(*seen) if isinstance(seen, tuple) else Guesses(seen.logits.float(), seen.pred_boxes.float())


class Detectors(OwnNetworks):
    """A task whose models detect objects. What derives from it has `categories`, `size` and `channels`."""

    networks: ClassVar[Mapping[str, str]] = {"detection-cnn": "jobs.tasks.detection_network:DetectionCnn"}
    categories: Sequence[str]
    size: tuple[int, int]
    channels: int

    def check_model(self, architecture: str, config: Mapping[str, Any]) -> None:
        """Raise TaskError for an unknown architecture, an entry that its config has not, or what makes no model."""
        if architecture not in SETS:
            super().check_model(architecture, config)
            return
        from transformers import AutoModelForObjectDetection

        from jobs.tasks.architectures import check_builds

        check_builds(AutoModelForObjectDetection, architecture, self._config_of(architecture, config))

    def check_parent(self, directory: Path, config: Mapping[str, Any]) -> None:
        """Raise TaskError for a model that detects no objects, or has no place for an entry of `config`."""
        from jobs.tasks import loading

        if _kind(directory) in SETS:
            loading.check_parent(directory, config, TABLE, "object-detecting")
        else:
            super().check_parent(directory, config)

    def build(self, architecture: str, config: Mapping[str, Any]) -> torch.nn.Module:
        """Make a network with fresh weights in fp32."""
        if architecture not in SETS:
            return super().build(architecture, config)
        from transformers import AutoModelForObjectDetection

        model: torch.nn.Module = AutoModelForObjectDetection.from_config(self._config_of(architecture, config)).float()
        return model

    def load_model(
        self, directory: Path, dtype: torch.dtype | None = None, config: Mapping[str, Any] | None = None
    ) -> torch.nn.Module:
        """Load a model directory, in evaluation mode."""
        if _kind(directory) not in SETS:
            return super().load_model(directory, dtype, config)
        from transformers import AutoModelForObjectDetection

        from jobs.tasks import loading

        model, self.said = loading.load(AutoModelForObjectDetection, directory, dtype, config or {})
        found: torch.nn.Module = model
        return found

    def _config_of(self, architecture: str, config: Mapping[str, Any]) -> Any:
        from jobs.tasks.architectures import config_for

        decided = {"num_channels", "image_size", "id2label", "label2id", "num_labels"} & set(config)
        if decided:
            raise TaskError(f"model.config: {min(decided)!r} is no entry for a job to set: it follows from the data")
        names = list(self.categories) or ["object"]
        known: dict[str, Any] = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
        known |= {"num_channels": self.channels, "image_size": list(self.size)} if self.channels else {}
        if architecture == "detr":
            known["backbone_config"] = self._backbone(config.get("backbone_config"))
        entries = {key: value for key, value in config.items() if key != "backbone_config" or architecture != "detr"}
        return config_for(architecture, entries, TABLE, "object-detecting", {**known, "auxiliary_loss": False})

    def _backbone(self, config: Any) -> Any:
        """Return the config of DETR's backbone, with fresh weights: a resnet, unless `model_type` says another.

        Raises:
            TaskError: an entry that the backbone has not.
        """
        from transformers import AutoConfig

        from jobs.tasks.architectures import check_entries, last_line

        entries = dict(config or {})
        kind = entries.pop("model_type", "resnet")
        try:
            default = AutoConfig.for_model(kind)
            check_entries(f"backbone_config ({kind})", default, entries)
            channels = {"num_channels": self.channels} if self.channels else {}
            return AutoConfig.for_model(kind, **{**channels, **entries})
        except TaskError:
            raise
        except Exception as error:  # transformers validates configs with several kinds of exception
            raise TaskError(f"model.config.backbone_config: {last_line(error)}") from error


def _kind(directory: Path | str) -> str:
    """Return the model_type of a model directory; "" where it cannot be told."""
    from transformers import PretrainedConfig

    try:
        found, _ = PretrainedConfig.get_config_dict(str(directory))
    except OSError:
        return ""
    return str(found.get("model_type", ""))
