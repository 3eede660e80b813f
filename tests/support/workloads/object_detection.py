"""Circles, squares and triangles in generated pictures, as a COCO file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from jobs.data import corpora_shapes
from tests.support.workloads import Endpoint, Workload


def write(folder: Path) -> None:
    """Write 120 pictures, and their annotations."""
    corpora_shapes.write(folder / "shapes", 120)


def learned(metrics: dict[str, float]) -> None:
    assert metrics["mAP50"] > 0.15  # of a minute's training; untrained it is below 0.01


def asked(endpoint: Endpoint) -> None:
    pixels, objects = zip(*corpora_shapes.pictures(3), strict=True)
    answer = endpoint.infer(image=("UINT8", [3, 64, 64, 3], np.stack(pixels).ravel().tolist()))
    found = [json.loads(each) for each in answer["detections"]]
    assert [len(each) for each in found] == answer["count"]
    for guesses, truths in zip(found, objects, strict=True):
        middles = [np.array(guess["box"][:2]) + np.array(guess["box"][2:]) / 2 for guess in guesses]
        for truth in truths:  # something is found near the middle of each
            middle = np.array(truth["bbox"][:2]) + np.array(truth["bbox"][2:]) / 2
            assert min(np.abs(middle - each).max() for each in middles) < 6


WORKLOAD = Workload(
    name="detection",
    task={"name": "object-detection", "score_threshold": 0.1},
    model={"architecture": "detection-cnn", "config": {"width": 16, "blocks": 1}},
    data={"train": "shapes/annotations.json", "eval_fraction": 0.1},
    write=write,
    learned=learned,
    asked=asked,
    training={"steps": 60, "global_batch_size": 8, "learning_rate": 5e-3},
    pictures=("detections.png",),
    unquantised="it has no linear layer",
)
