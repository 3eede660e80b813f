"""Users who go round a circle of twelve items, each from a place of their own."""

from __future__ import annotations

import csv
from pathlib import Path

from tests.support.workloads import Endpoint, Workload

ITEMS = [f"item-{number:02d}" for number in range(12)]


def write(folder: Path) -> None:
    """Write a log of 60 users with nine interactions each, the users' rows mixed."""
    with (folder / "log.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["user", "item", "time"])
        for step in range(9):
            for user in range(60):
                writer.writerow([f"u{user}", ITEMS[(user + step) % 12], step])


def learned(metrics: dict[str, float]) -> None:
    assert metrics["ndcg_10_all"] > 0.9 > metrics["popularity_ndcg_10_all"]


def asked(endpoint: Endpoint) -> None:
    history = ["item-03", "item-04", "item-05", "", "item-10", "never"]
    answer = endpoint.infer(history=("BYTES", [2, 3], history), k=("INT32", [2], [1, 1]))
    assert answer["items"] == ["item-06", "item-11"]
    assert answer["unknown"] == [0, 1]
    assert answer["ranked_by"] == ["model", "model"]


WORKLOAD = Workload(
    name="circle",
    task={"name": "recommendation", "max_length": 8, "negatives": 3},
    model={
        "architecture": "sasrec",
        "config": {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32, "dropout": 0.0},
    },
    data={"train": "log.csv"},
    write=write,
    learned=learned,
    asked=asked,
    training={"steps": 40, "global_batch_size": 32, "learning_rate": 2e-2},
)
