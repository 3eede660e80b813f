"""Where work is done: here, by processes of this machine, or by tasks all over the cluster.

Work is done on items one by one, and results come in the items' order: what they are does not depend on where.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from typing import Any, Literal, TypeVar

from cluster.results import result_of

Given = TypeVar("Given")
Made = TypeVar("Made")
Place = Literal["here", "processes", "cluster", "beside"]
"""Of these, "beside" are tasks of a cluster whose CPUs others have: they ask for none, and are few at a time."""
LOOK_S = 1.0
"""So often it is looked how far the work has got."""


def elsewhere() -> Place:
    """Return where work may go from this process: to the cluster, if it is connected to one."""
    ray = sys.modules.get("ray")
    return "cluster" if ray is not None and ray.is_initialized() else "processes"


class Helpers:
    """Those that work beside this process: begun when they are first needed, gone at the end of a `with`."""

    def __init__(self, taken_cpus: float = 0.0) -> None:
        """Take how many CPUs of a cluster others have where work goes on beside them."""
        self._taken_cpus = taken_cpus
        self._pool: ProcessPoolExecutor | None = None
        self._before: set[Any] = set()

    def __enter__(self) -> Helpers:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if self._pool is None:
            return
        if error is not None:  # what they are at is of no use
            for process in set(multiprocessing.active_children()) - self._before:
                process.kill()
        self._pool.shutdown(cancel_futures=True)

    def do(
        self,
        work: Callable[[Given], Made],
        items: Iterable[Given],
        place: Place,
        on_wait: Callable[[], None] = lambda: None,
    ) -> Iterator[Made]:
        """Do `work` on each item and yield the results in the items' order; few items are under way at a time.

        Args:
            on_wait: called now and then while a result is waited for.

        Raises:
            Exception: what the work raised first, in the items' order.
        """
        if place == "here":
            yield from map(work, items)
        elif place == "processes":
            yield from self._by_processes(work, items, on_wait)
        else:
            yield from _by_tasks(work, items, on_wait, self._taken_cpus if place == "beside" else None)

    def _by_processes(
        self, work: Callable[[Given], Made], items: Iterable[Given], on_wait: Callable[[], None]
    ) -> Iterator[Made]:
        if self._pool is None:
            self._before = set(multiprocessing.active_children())
            self._pool = ProcessPoolExecutor(cpus(), multiprocessing.get_context("spawn"), _end_with_parent)
        running: deque[Future[Made]] = deque()
        for item in items:
            running.append(self._pool.submit(work, item))
            if len(running) == 2 * cpus():
                yield _result(running.popleft(), on_wait)
        while running:
            yield _result(running.popleft(), on_wait)


def _result(future: Future[Made], on_wait: Callable[[], None]) -> Made:
    while not wait([future], timeout=LOOK_S).done:
        on_wait()
    return future.result()


def _by_tasks(
    work: Callable[[Given], Made],
    items: Iterable[Given],
    on_wait: Callable[[], None],
    taken_cpus: float | None = None,
) -> Iterator[Made]:
    """Do it by tasks of the cluster.

    Args:
        taken_cpus: what others have of it, as workers that may wait for this work: what it needs, it must not wait for.
    """
    import ray

    def one(item: Given) -> Made:  # Ray takes functions, and `work` may be a partial one
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a task has one CPU
        return work(item)

    cpus = int(ray.cluster_resources().get("CPU", 1))
    if taken_cpus is None:
        remote, limit = ray.remote(num_cpus=1, max_retries=3)(one), 2 * max(1, cpus)
    else:
        remote = ray.remote(num_cpus=0, max_retries=3, scheduling_strategy="SPREAD")(one)
        limit = max(1, int(cpus - taken_cpus))
    running: deque[Any] = deque()

    def first() -> Made:
        while not ray.wait([running[0]], timeout=LOOK_S)[0]:
            on_wait()
        found: Made = result_of(running.popleft())
        return found

    try:
        for item in items:
            running.append(remote.remote(item))
            if len(running) == limit:
                yield first()
        while running:
            yield first()
    finally:
        for reference in running:
            ray.cancel(reference)


def cpus() -> int:
    """Return on how many CPUs this process may run."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _end_with_parent() -> None:
    """Let this process end when the one that started it does, however that ends; it has one CPU."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None, "a process of a pool has a parent"

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, name="tandem-parent", daemon=True).start()
