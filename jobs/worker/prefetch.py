"""The rows of each step, read and made into batches while the step before is computed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from jobs.data import batches, mixture
from jobs.data.arrivals import Arriving, NoMore
from jobs.data.early_order import EarlyOrder
from jobs.data.mixture import Mixed
from jobs.tasks import Batch
from jobs.worker.awaiting import awaited
from jobs.worker.evaluate import pinned
from jobs.worker.setup import Worker


def prefetch(worker: Worker) -> Iterator[tuple[int, tuple[list[Batch | None], int, float]]]:
    """Yield, per step, (this rank's micro-batches, targets of the global batch, seconds waited), one step ahead.

    A micro-batch has tensors [b, …]; it is None where this rank has no rows left for it. Where rows do not come that a
    step needs, on all ranks, that step is noted as `short`, and there are no more.
    """
    size = worker.training.global_batch_size
    order = order_of(worker)
    last = worker.steps if worker.until is None else worker.until
    steps = [step for step in range(worker.start, last) if step not in worker.skip]

    def made(rows: np.ndarray) -> Batch:
        return pinned(worker.part(worker.task.collate(worker.rows.take(rows))), worker.engine.device)

    def fetch(step: int) -> tuple[list[Batch | None], int]:
        chosen = order.take(step * size, size)
        mine = batches.share(chosen, worker.place.reader, worker.place.readers, worker.micro_batch)
        worker.injector.record_rows(step + 1, mine)
        micro = [made(each) if len(each) else None for each in mine]
        if worker.learned is not None and isinstance(order, Mixed):
            return micro, worker.learned.fetched(step, order, chosen, worker.rows)
        return micro, worker.rows.targets(chosen)

    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
        upcoming = [pool.submit(fetch, step) for step in steps[:1]]
        for index, step in enumerate(steps):
            began = time.perf_counter()
            try:
                micro, targets = taken(worker, step, upcoming.pop())
            except NoMore:
                worker.short = step
                return
            waited = time.perf_counter() - began
            upcoming += [pool.submit(fetch, following) for following in steps[index + 1 : index + 2]]
            yield step, (micro, targets, waited)


def order_of(worker: Worker) -> batches.Order | Mixed | EarlyOrder:
    """Return the order in which the run visits its rows."""
    if isinstance(worker.rows, Arriving):
        return EarlyOrder(worker.rows, worker.training.seed)
    return mixture.order_of(worker.mixed, len(worker.rows), worker.training.seed, worker.order)


def taken(worker: Worker, step: int, fetched: Future[tuple[list[Batch | None], int]]) -> tuple[list[Batch | None], int]:
    """Return what was fetched for a step, micro-batches with tensors [b, …] and targets, once it is there.

    Raises:
        NoMore: it does not come.
    """
    if not isinstance(worker.rows, Arriving):
        return fetched.result()
    return awaited(fetched, worker.watchdog, worker.rows.sign, f"step {step + 1}" if worker.first else "")
