"""Measure a model on held-out rows, over all workers."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from jobs.rows import Rows
from jobs.tasks import Task

Sum = Callable[..., list[float]]


def evaluate(
    task: Task,
    model: torch.nn.Module,
    rows: Rows,
    *,
    limit: int | None,
    micro_batch: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    all_sum: Sum | None = None,
) -> dict[str, float]:
    """Return the task's metrics over the first `limit` rows (all for None); rank r of W measures every W-th.

    Each rank makes the same number of forward passes (ZeRO-3 gathers weights in each), the last ones with no weight.
    """
    count = len(rows) if limit is None else min(limit, len(rows))
    passes = math.ceil(math.ceil(count / world_size) / micro_batch)
    mine = np.arange(count)[rank::world_size]
    totals: dict[str, float] = {}
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for index in range(passes):
            chosen = mine[index * micro_batch : (index + 1) * micro_batch]
            batch = to_device(task.collate(rows.take(chosen if len(chosen) else np.zeros(1, dtype=np.int64))), device)
            for key, value in task.measure(model, batch).items():
                totals[key] = totals.get(key, 0.0) + (float(value) if len(chosen) else 0.0)
    model.train(was_training)
    if all_sum is not None:
        totals = dict(zip(totals, all_sum(*totals.values()), strict=True))
    return task.summarise(totals)


def to_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Move a batch; a copy to an accelerator does not wait."""
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()} if device.type != "cpu" else batch
