"""Bright squares above or below the middle of a small image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from tests.support.workloads import Endpoint, Workload

SIDE = 8


def image(label: str, draw: np.random.Generator) -> np.ndarray:
    """Return uint8 (8, 8): noise, with a bright square in the half that the label names."""
    pixels = draw.integers(0, 80, (SIDE, SIDE)).astype(np.uint8)
    top, left = draw.integers(0, 2) + (0 if label == "above" else 4), draw.integers(0, 5)
    pixels[top : top + 3, left : left + 3] = 255
    return pixels


def write(folder: Path) -> None:
    """Write 120 images into a folder for each label."""
    draw = np.random.default_rng(0)
    for label in ("above", "below"):
        (folder / "squares" / label).mkdir(parents=True)
        for number in range(60):
            Image.fromarray(image(label, draw)).save(folder / "squares" / label / f"{number}.png")


def learned(metrics: dict[str, float]) -> None:
    assert metrics["accuracy"] > 0.9


def asked(endpoint: Endpoint) -> None:
    draw, labels = np.random.default_rng(1), ["below", "above", "below"]
    pixels = np.stack([image(label, draw) for label in labels])
    answer = endpoint.infer(image=("UINT8", [3, SIDE, SIDE, 1], pixels.ravel().tolist()))
    assert answer["label"] == labels


WORKLOAD = Workload(
    name="squares",
    task="image-classification",
    model={"architecture": "cnn", "config": {"width": 8, "hidden_size": 32}},
    data={"train": "squares", "eval_fraction": 0.2},
    write=write,
    learned=learned,
    asked=asked,
    training={"steps": 30, "global_batch_size": 16, "learning_rate": 5e-3},
)
