"""Patterns as identities: every take of one has noise of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from tests.support.workloads import Endpoint, Workload

SIDE, TAKES = 8, 30
PATTERNS = np.random.default_rng(0).integers(0, 2, (4, SIDE, SIDE)) * 150


def take(identity: int, draw: np.random.Generator) -> np.ndarray:
    """Return uint8 (8, 8): the identity's pattern, and noise."""
    return (PATTERNS[identity] + draw.integers(0, 100, (SIDE, SIDE))).astype(np.uint8)


def write(folder: Path) -> None:
    """Write 30 images into a folder for each of four identities."""
    draw = np.random.default_rng(1)
    for identity in range(len(PATTERNS)):
        (folder / "people" / f"p{identity}").mkdir(parents=True)
        for number in range(TAKES):
            Image.fromarray(take(identity, draw)).save(folder / "people" / f"p{identity}" / f"{number}.png")


def learned(metrics: dict[str, float]) -> None:
    assert metrics["auc"] > 0.9


def asked(endpoint: Endpoint) -> None:
    draw, identities, others = np.random.default_rng(2), [0, 3, 2, 1], [0, 1, 2, 2]
    sent = {
        name: ("UINT8", [4, SIDE, SIDE, 1], np.stack([take(each, draw) for each in of]).ravel().tolist())
        for name, of in (("image", identities), ("other", others))
    }
    answer = endpoint.infer(**sent)
    assert answer["identity"] == ["p0", "p3", "p2", "p1"]
    assert answer["same"] == [True, False, True, False]
    alone = endpoint.infer(image=sent["image"])
    assert np.allclose(alone["embedding"], answer["embedding"], atol=1e-5)
    assert "same" not in alone


WORKLOAD = Workload(
    name="faces",
    task={"name": "image-embedding", "shift": 0.1},
    model={"architecture": "embedding-cnn", "config": {"width": 8, "embedding_size": 32}},
    data={"train": "people", "eval_fraction": 0.2},
    write=write,
    learned=learned,
    asked=asked,
    training={"steps": 80, "global_batch_size": 16, "learning_rate": 5e-3},
    pictures=("roc.png", "similarity.png"),
)
