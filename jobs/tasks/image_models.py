"""Image classifiers: `cnn`, ours, and those of transformers; built and loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.tasks import TaskError
from jobs.tasks.architectures import check_entries

if TYPE_CHECKING:
    import torch


TABLE = "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES"
"""The name of transformers' own table of the architectures that classify images."""


def check(architecture: str, config: Mapping[str, Any]) -> Any:
    """Return the architecture's default config.

    Raises:
        TaskError: an unknown architecture, or a key that its config has not.
    """
    from transformers import AutoConfig

    from jobs.tasks import cnn

    cnn.register()
    try:
        default = AutoConfig.for_model(architecture)
    except (ValueError, KeyError) as error:
        raise TaskError(f"model.architecture {architecture!r}: {str(error).splitlines()[0]}") from error
    check_entries(architecture, default, config)
    return default


def check_builds(architecture: str, config: Mapping[str, Any]) -> None:
    """Refuse what `check` refuses, and a config of which no model can be made, by making one without memory.

    The size of its images is not known yet, nor are the labels: it gets the architecture's own.

    Raises:
        TaskError: as above.
    """
    from transformers import AutoConfig, AutoModelForImageClassification
    from transformers.models.auto import modeling_auto

    from jobs.tasks import architectures

    check(architecture, config)
    if architecture not in {"cnn", *getattr(modeling_auto, TABLE)}:
        raise TaskError(f"model.architecture: {architecture!r} is no image-classifying architecture")
    try:
        whole = AutoConfig.for_model(architecture, **config)
    except Exception as error:  # whatever a config's own checks raise
        said = " ".join(str(error).split())[:200]
        raise TaskError(f"model.config for {architecture}: {type(error).__name__}: {said}") from error
    architectures.check_builds(AutoModelForImageClassification, architecture, whole)


def build(
    architecture: str, config: Mapping[str, Any], labels: Sequence[str], size: tuple[int, int], channels: int
) -> torch.nn.Module:
    """Make a classifier with fresh weights in fp32.

    Raises:
        TaskError: an unknown architecture, or a key that its config has not, or values that make no model.
    """
    from transformers import AutoConfig, AutoModelForImageClassification

    known = {"num_channels": channels, "id2label": dict(enumerate(labels))}
    known["label2id"] = {label: i for i, label in enumerate(labels)}
    if hasattr(check(architecture, config), "image_size"):
        known["image_size"] = size[0]
    try:
        model = AutoModelForImageClassification.from_config(AutoConfig.for_model(architecture, **known, **config))
    except (ValueError, KeyError) as error:
        raise TaskError(f"model.architecture {architecture!r}: {str(error).splitlines()[0]}") from error
    return model.float()


def check_parent(directory: Path, config: Mapping[str, Any]) -> None:
    """Raise TaskError for a model that classifies no images, or an entry that its config has not."""
    from jobs.tasks import cnn, loading

    cnn.register()
    loading.check_parent(directory, config, TABLE, "image-classifying")


def load(directory: Path, dtype: torch.dtype | None, config: Mapping[str, Any]) -> tuple[torch.nn.Module, list[str]]:
    """Load a model directory (also one quantised by torchao); return it and what is to be said.

    Raises:
        TaskError: it holds no whole image classifier.
    """
    from transformers import AutoModelForImageClassification

    from jobs.tasks import cnn, loading

    cnn.register()
    return loading.load(AutoModelForImageClassification, directory, dtype, config)
