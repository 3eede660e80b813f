"""A ball on a line that is pushed back to the middle, in episodes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tests.support.workloads import Endpoint, Workload


def write(folder: Path) -> None:
    """Write 20 episodes of 15 steps: the push is against where the ball will be."""
    draw = np.random.default_rng(0)
    with (folder / "log.jsonl").open("w") as file:
        for episode in range(20):
            for place, speed in draw.normal(size=(15, 2)):
                push = "left" if place + speed > 0 else "right"
                row = {"episode": episode, "observation": [round(place, 4), round(speed, 4)], "action": push}
                file.write(json.dumps(row) + "\n")


def learned(metrics: dict[str, float]) -> None:
    assert metrics["accuracy"] > 0.9


def asked(endpoint: Endpoint) -> None:
    answer = endpoint.infer(observation=("FP32", [3, 2], [1.5, 0.5, -1.0, -1.0, 0.1, 2.0]))
    assert answer["action"] == ["left", "right", "left"]


WORKLOAD = Workload(
    name="ball",
    task={"name": "policy", "episode_column": "episode"},
    model={"architecture": "mlp", "config": {"hidden_size": 16, "layers": 1, "dropout": 0.0}},
    data={"train": "log.jsonl", "eval_fraction": 0.2},
    write=write,
    learned=learned,
    asked=asked,
    training={"steps": 80, "global_batch_size": 32, "learning_rate": 1e-2},
    pictures=("confusion.png",),
)
