"""What item-to-item neighbours rank, on the rows that a recommender of ours is measured on.

An item is scored by the cosine of its users with those of each item in a history (Sarwar et al. 2001), the latest ones
first: no training, and hard to beat on small logs.

    python benchmarks/item_neighbours.py jobs/specs/movielens.yaml /path/to/u.data.csv
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from cluster import specfile
from jobs.data import prepare
from jobs.spec import JobSpec
from jobs.tasks.next_item import NextItem
from jobs.worker.evaluate import measure

LATEST = 20
"""So many items of a history count, each 0.9 of the one after it."""


class Neighbours(torch.nn.Module):
    """Scores items (B, C) for histories (B, L), as a network of the task's does."""

    def __init__(self, users: list[list[int]], items: int) -> None:
        super().__init__()
        met = np.zeros((len(users), items + 1), dtype=np.float32)
        for row, numbers in enumerate(users):
            met[row, numbers] = 1
        together = met.T @ met
        norms = np.sqrt(np.maximum(together.diagonal(), 1))
        cosine = together / norms[:, None] / norms[None, :]
        np.fill_diagonal(cosine, 0)
        cosine[0] = 0
        self.cosine = torch.nn.Parameter(torch.from_numpy(cosine), requires_grad=False)

    def forward(self, inputs: torch.Tensor, where: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """Add the cosines of the latest items up, (B, C)."""
        scores = []
        for row, last in zip(inputs.tolist(), where.long().argmax(1).tolist(), strict=True):
            latest = row[: last + 1][-LATEST:]
            weights = 0.9 ** torch.arange(len(latest) - 1, -1, -1.0)
            scores.append((weights[:, None] * self.cosine[latest][:, candidates]).sum(0))
        return torch.stack(scores)


def main(spec_path: str, data: str) -> None:
    """Prepare the data as a job does, and print the metrics."""
    spec = specfile.load(Path(spec_path), JobSpec, [f"data.train={data}"])
    with tempfile.TemporaryDirectory() as folder:
        made = prepare.prepare(spec, Path.cwd(), Path(folder), parent=None, on_progress=lambda *_: None)
        task = made.task(spec)
        assert isinstance(task, NextItem)
        rows = prepare.rows_of(made, made.eval_files)
        met = [[number for number in row if number] for row in rows.take(np.arange(len(rows)))["met"].tolist()]
        model = Neighbours(met, len(task.items))
        how = {"limit": None, "seed": 0, "micro_batch": 64, "device": torch.device("cpu")}
        for name, value in task.summarise(measure(task, model, rows, **how)).items():
            if name != "loss":
                print(f"{name:24} {value:.4f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
