"""Series that repeat a season of six steps, each at a level of its own."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from tests.support.workloads import Endpoint, Workload

SEASON = np.array([1.0, 2.0, 4.0, 3.0, 2.0, 0.5])


def write(folder: Path) -> None:
    """Write 24 series of 72 steps, with noise, in long format."""
    draw = np.random.default_rng(0)
    with (folder / "series.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "step", "value"])
        for number in range(24):
            values = np.tile(SEASON, 12) * draw.uniform(5, 50) * np.exp(draw.normal(0, 0.15, 72))
            writer.writerows([f"s{number}", step, round(value, 3)] for step, value in enumerate(values))


def learned(metrics: dict[str, float]) -> None:
    assert metrics["mase"] < metrics["naive_mase"]
    assert metrics["coverage"] > 0.5


def asked(endpoint: Endpoint) -> None:
    history = np.tile(SEASON, 4) * 20
    answer = endpoint.infer(history=("FP32", [1, len(history)], history.tolist()), horizon=("INT32", [1], [2]))
    np.testing.assert_allclose(answer["median"], SEASON[:2] * 20, rtol=0.3)
    quantiles = np.array(answer["quantiles"]).reshape(2, 9)
    assert (np.diff(quantiles) >= 0).all()


WORKLOAD = Workload(
    name="season",
    task={
        "name": "forecasting",
        "series_column": "name",
        "time_column": "step",
        "target_column": "value",
        "horizon": 3,
        "season": 6,
        "context_length": 24,
        "scaling": "standard",
    },
    model={
        "architecture": "transformer",
        "config": {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32, "patch_length": 6},
    },
    data={"train": "series.csv"},
    write=write,
    learned=learned,
    asked=asked,
    training={"steps": 100, "global_batch_size": 32, "learning_rate": 5e-3},
    pictures=("forecasts.png",),
)
