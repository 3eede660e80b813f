"""Passes over the longest rows, to see what they take: on the engine that is about to train, which stays as it was.

A trial is what most of a step's passes come to, and the most that one takes: a pass that is not the step's last, over
one row, so that its gradients are there, and a last one over the rows in question, whose gradients are reduced. The
optimizer takes no step, gradients are thrown away, and random states and buffers are put back: training afterwards is
the same, bit by bit, as without (tests/integration/test_jobs_trial.py).

A rank that runs out of memory in the middle of a pass leaves others waiting and the engine half done, so it is not
caught here: the group is started again, with half the rows (jobs/driver/failures.py).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from jobs.checkpoint import resume
from jobs.data.rows import Rows
from jobs.tasks import Batch, Task
from jobs.worker import trial_internals
from jobs.worker.deepspeed_engine import Engine
from jobs.worker.evaluate import to_device
from jobs.worker.growth import Growth
from jobs.worker.rows_search import Took

LOOKED_AT = 2048
"""So many rows are looked at for the longest, drawn evenly from all, of a mixture from each source."""
AT_A_TIME = 16


@dataclass
class Trial:
    """One rank's."""

    engine: Engine
    task: Task
    rows: Rows
    growth: Growth
    sources: tuple[int, ...] = ()
    """The rows of each source of a mixture, which follow each other."""
    longest: int = field(init=False)
    """The number of the row whose batch is largest."""

    def __post_init__(self) -> None:
        with kept(self.engine.model.module, self.engine.device):
            self.longest = longest(self.task, self.rows, self.sources or (len(self.rows),))

    def batch(self, rows: int) -> Batch:
        """Return a micro-batch, tensors (b, …), of the longest row as often as there are rows in it: none is larger."""
        return self.task.collate(self.rows.take(np.full(rows, self.longest, dtype=np.int64)))

    def took(self, rows: int) -> Took:
        """Return what passes over so many rows take, on the rank where they take most. Collective."""
        peaks: list[int] = []
        model, growth = self.engine.model, self.growth
        with kept(model.module, self.engine.device):
            model.train()
            with growth.measured(peaks), trial_internals.thrown_away(model) as last:
                self._pass(1)
                held = growth.held()
                last()
                loss = self._forward(rows)
                turned = growth.now()
                self.engine.backward(loss)
        growth.settle()
        ranks = resume.gathered((held, turned, peaks[0]))
        return Took(*map(max, zip(*ranks, strict=True)))

    def _pass(self, rows: int) -> None:
        self.engine.backward(self._forward(rows))

    def _forward(self, rows: int) -> torch.Tensor:
        """Return the loss, a scalar."""
        loss, targets = self.task.loss(self.engine.model, to_device(self.batch(rows), self.engine.device))
        return loss / targets.clamp(min=1)


def longest(task: Task, rows: Rows, sources: Sequence[int]) -> int:
    """Return the number of the row that makes the largest batch, of up to LOOKED_AT of them.

    Args:
        sources: how many rows each source has; as many are looked at of each, for a small one may be seen most.
    """
    each, ends = -(-LOOKED_AT // len(sources)), np.cumsum(sources)
    spread = [
        np.linspace(end - size, end - 1, min(each, size)).astype(np.int64)
        for end, size in zip(ends, sources, strict=True)
    ]
    numbers = np.unique(np.concatenate(spread))
    groups = np.array_split(numbers, -(-len(numbers) // AT_A_TIME))
    # A batch is as wide as the longest of its rows, so that of a group tells whether that is in it.
    widest = max(groups, key=lambda group: _elements(task.collate(rows.take(group))) / len(group))
    return int(max(widest, key=lambda number: _elements(task.collate(rows.take(np.array([number]))))))


def _elements(batch: Batch) -> int:
    return sum(tensor.numel() for tensor in batch.values())


@contextmanager
def kept(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Put random states, and the buffers of a model, back as they were."""
    buffers = [
        (module, name, tensor, tensor.detach().clone())
        for module in model.modules()
        for name, tensor in module.named_buffers(recurse=False)
    ]
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        with torch.no_grad():
            for module, name, tensor, content in buffers:
                tensor.copy_(content)
                setattr(module, name, tensor)
