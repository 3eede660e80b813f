"""What a job would measure of a model on rows in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from jobs.tasks import Columns, Task
from jobs.worker.evaluate import measure


class Memory:
    """Rows in memory, with what `measure` asks of those on disk."""

    def __init__(self, columns: Columns) -> None:
        """`columns`: (N, …) each."""
        self._columns = columns

    def __len__(self) -> int:
        return len(self._columns["targets"])

    def take(self, indices: np.ndarray) -> Columns:
        """Return the rows at `indices` (B,), each column (B, …)."""
        return {name: column[indices] for name, column in self._columns.items()}


def sums(task: Task, model: Any, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the task's sums over the examples, in batches that do not divide them."""
    rows: Any = Memory(task.encode(examples))
    return measure(task, model, rows, limit=None, seed=0, micro_batch=7, device=torch.device("cpu"))


def train(model: torch.nn.Module, task: Task, examples: Sequence[Mapping[str, Any]], steps: int) -> torch.nn.Module:
    """Train a model on all examples at once, a moment long; return it in evaluation mode."""
    batch = task.collate(task.encode(examples))
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2)
    for _ in range(steps):
        total, count = task.loss(model, batch)
        optimizer.zero_grad()
        (total / count).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model.eval()
