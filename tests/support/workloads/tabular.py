"""Loans of two kinds of people, some of whom say nothing of their income, and whether they were paid back."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from tests.support.workloads import Endpoint, Workload


def write(folder: Path) -> None:
    """Write 200 rows: a loan is paid back where work is steady, or the income high."""
    draw = np.random.default_rng(0)
    with (folder / "loans.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["income", "work", "since", "number", "paid"])
        for row in range(200):
            income, work = float(draw.lognormal(8, 1)), str(draw.choice(["steady", "seasonal", "none"]))
            paid = work == "steady" or income > 4000
            told = "" if row % 10 == 0 else f"{income:.2f}"
            table.writerow([told, work, f"20{row % 20:02}-06-01", f"loan {row}", "yes" if paid else "no"])


def learned(metrics: dict[str, float]) -> None:
    assert metrics["auc"] > 0.85
    assert metrics["accuracy"] > 0.75


def asked(endpoint: Endpoint) -> None:
    answer = endpoint.infer(
        income=("FP64", [3], [20_000.0, 500.0, 700.0]),
        work=("BYTES", [3], ["steady", "none", "seasonal"]),
        since=("BYTES", [3], ["2010-06-01"] * 3),
    )
    assert answer["label"] == ["yes", "no", "no"]
    unsaid = endpoint.infer(work=("BYTES", [1], ["steady"]), since=("BYTES", [1], ["2010-06-01"]))
    assert unsaid["label"] == ["yes"]


WORKLOAD = Workload(
    name="loans",
    task={"name": "tabular", "target_column": "paid"},
    model={"architecture": "mlp", "config": {"hidden_size": 32, "layers": 1, "embedding_size": 4}},
    data={"train": "loans.csv", "eval_fraction": 0.2},
    write=write,
    learned=learned,
    asked=asked,
    training={"steps": 60, "global_batch_size": 32, "learning_rate": 1e-2},
    pictures=("confusion.png", "roc.png", "reliability.png"),
)
