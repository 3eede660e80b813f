"""Bright discs in the middle of small images, to be made from noise."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
from PIL import Image

from tests.support.workloads import Endpoint, Workload

SIDE = 8
ROWS, COLUMNS = np.indices((SIDE, SIDE)) - (SIDE - 1) / 2


def disc(draw: np.random.Generator) -> np.ndarray:
    """Return uint8 (8, 8): dark, with a disc of 2 to 3 pixels' radius, a pixel off the middle at most."""
    down, across = draw.uniform(-1, 1, 2)
    inside = np.hypot(ROWS - down, COLUMNS - across) < draw.uniform(2, 3)
    return np.where(inside, draw.integers(180, 256), 10).astype(np.uint8)


def write(folder: Path) -> None:
    """Write 160 images into a folder for a label, which is not read."""
    draw = np.random.default_rng(0)
    (folder / "discs" / "disc").mkdir(parents=True)
    for number in range(160):
        Image.fromarray(disc(draw)).save(folder / "discs" / "disc" / f"{number}.png")


def learned(metrics: dict[str, float]) -> None:
    assert metrics["frechet_distance"] < 2.2  # untrained: 2.8; after 80 steps: about 1.4


def asked(endpoint: Endpoint) -> None:
    made = endpoint.infer(seed=("INT64", [4], [1, 2, 1, 3]))["image"]
    images = [np.asarray(Image.open(io.BytesIO(base64.b64decode(content)))).astype(int) for content in made]
    assert {image.shape for image in images} == {(SIDE, SIDE)}
    assert np.abs(images[0] - images[2]).max() <= 1  # rounding may differ by the place in a batch
    assert min(np.abs(images[0] - images[other]).max() for other in (1, 3)) > 1
    middle = np.mean([image[3:5, 3:5] for image in images])
    corners = np.mean([image[[0, 0, 7, 7], [0, 7, 0, 7]] for image in images])
    assert middle > corners + 60


WORKLOAD = Workload(
    name="gan",
    task={"name": "gan", "latent_size": 16},
    model={"architecture": "gan-cnn", "config": {"width": 8}},
    data={"train": "discs", "eval_fraction": 0.2},
    write=write,
    learned=learned,
    asked=asked,
    training={"steps": 80, "global_batch_size": 32, "learning_rate": 3e-3, "betas": [0.5, 0.99], "weight_decay": 0.0},
    pictures=("samples.png",),
    falls=False,
)
