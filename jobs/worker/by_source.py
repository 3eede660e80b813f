"""The loss of each source of a mixture, measured in the passes that measure the whole: no row is read twice.

    for name, chosen in passes(…):            the rows of a pass are of one source
        sums of all, and of `name`            two numbers more for each source, added up over ranks with the others
    summarised(task, sums)                    {"loss": …, "loss/wiki": …, "loss/code": …}

Rows of the sources follow each other in the files, and no row, packed or not, holds two sources.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jobs.tasks import Task

Sources = Mapping[str, int]
"""Name of a source → how many rows of it there are, in the order of the rows; empty: they are of no source."""
_OF = " of source "
"""Stands in a name of sums between what is added up and the source that it is of: no task's own has it."""


def passes(
    measured: np.ndarray, sources: Sources, rank: int, world_size: int, micro_batch: int
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield, for each pass of a rank, the source of its rows ("" for none) and these, int64 (b,), b ≤ `micro_batch`.

    A rank measures every W-th row of all. Each has as many passes, of the same sources: the last of one may have none.

    Args:
        measured: the row numbers that are measured, int64 (N,), in order.
    """
    ends = np.searchsorted(measured, np.cumsum([*sources.values()])).tolist() if sources else [len(measured)]
    assert ends[-1] == len(measured), "all rows are of the sources"
    for name, start, end in zip(sources or [""], [0, *ends[:-1]], ends, strict=True):
        mine = measured[start:end][(rank - start) % world_size :: world_size]
        for first in range(0, -(-(end - start) // world_size), micro_batch):
            yield name, mine[first : first + micro_batch]


def counts(measured: np.ndarray, sources: Sources) -> dict[str, int]:
    """Return how many of the row numbers that are measured, int64 (N,), in order, are each source's."""
    ends = np.searchsorted(measured, np.cumsum([*sources.values()]))
    return dict(zip(sources, np.diff(ends, prepend=0).tolist(), strict=True))


def sum_of(source: str, name: str) -> str:
    """Return what the sum `name` is called of a source alone."""
    return f"{name}{_OF}{source}"


def of_all(sums: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sums over all sources, as the task's `measure` names them."""
    return {name: value for name, value in sums.items() if _OF not in name}


def summarised(task: Task, sums: Mapping[str, Any]) -> dict[str, float]:
    """Return the task's metrics, and the loss of each source as `loss/NAME`; of one without a term there is none.

    There is none either where the task divides its loss by something else than it says in `loss_terms`.
    """
    terms = sum_of("", task.loss_terms)
    counted = {name.removeprefix(terms): count for name, count in sums.items() if name.startswith(terms)}
    losses = {f"loss/{name}": sums[sum_of(name, "loss")] / count for name, count in counted.items() if count}
    metrics = task.summarise(of_all(sums))
    if losses and not _same(sums["loss"] / sums[task.loss_terms], metrics["loss"]):
        return metrics
    return {**metrics, **losses}


def _same(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-9) or (math.isnan(one) and math.isnan(other))
