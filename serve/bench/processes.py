"""A run in one process, or in several that begin together, where one would fill its CPU."""

from __future__ import annotations

import asyncio
import importlib.util
import math
import multiprocessing
import resource
import time
from collections.abc import Callable, Coroutine
from multiprocessing.connection import Connection as Pipe
from multiprocessing.connection import wait
from typing import Any, TypeVar

from cluster import garbage
from cluster.errors import UserError
from serve.bench import drive
from serve.bench.drive import Part
from serve.bench.record import Record
from serve.bench.settings import Settings
from serve.bench.workload import WordRate, Workload

Progress = Callable[[int, int], None]
"""Told of more requests that ended, and of how many of them failed."""
TELL_EVERY_S = 0.25
TOGETHER_S = 0.1
"""How long after the last process is ready they begin."""
FILES_BESIDE = 64
"""Open files of a process beside its connections."""
Result = TypeVar("Result")


def run_loop(work: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine in uvloop's event loop where it is installed, else in asyncio's own."""
    if loop_name() == "uvloop":
        import uvloop  # type: ignore[import-untyped,unused-ignore]

        with_loop: Result = uvloop.run(work)
        return with_loop
    return asyncio.run(work)


def loop_name() -> str:
    """Return the library whose event loop sends."""
    return "uvloop" if importlib.util.find_spec("uvloop") else "asyncio"


def files(connections: int, soft: float, hard: float) -> float:
    """Return how many files a process may have open from now on.

    Args:
        connections: that it may need.
        soft: what it may have open now.
        hard: what it may ask for.

    Raises:
        UserError: that is not enough.
    """
    needed = connections + FILES_BESIDE
    if hard < needed:
        raise UserError(
            f"{connections:,} connections in a process need {needed:,} open files, and the system allows {hard:,} "
            "(`ulimit -Hn`): use more --processes, or fewer --users (or --max-open)"
        )
    return max(soft, needed)


def _make_room(connections: int) -> None:
    """Let this process and its children have so many connections."""
    soft, hard = (math.inf if each < 0 else each for each in resource.getrlimit(resource.RLIMIT_NOFILE))
    if (wanted := files(connections, soft, hard)) > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (int(wanted), resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def run(settings: Settings, rate: WordRate, progress: Progress) -> list[Part]:
    """Send all requests; return each process's part. Raises UserError when a process died."""
    _make_room(-(-(settings.users or settings.max_open) // settings.processes))
    if settings.processes == 1:
        garbage.settle()
        part = Part(settings, begin_at=time.monotonic() + 0.05)
        return [run_loop(drive.run(part, Workload(settings, rate), _counting(progress)))]
    context = multiprocessing.get_context("spawn")
    pipes, workers = [], []
    for index in range(settings.processes):
        here, there = context.Pipe()
        part = Part(settings, index, settings.processes)
        worker = context.Process(target=_work, args=(part, rate, there), daemon=True)
        worker.start()
        there.close()
        pipes.append(here)
        workers.append(worker)
    try:
        for pipe in pipes:
            _received(pipe)  # it is ready
        begin_at = time.monotonic() + TOGETHER_S
        for pipe in pipes:
            pipe.send(begin_at)
        return _gathered(pipes, progress)
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def _counting(progress: Progress) -> drive.Told:
    return lambda found: progress(1, int(found.outcome != "ok"))


def _gathered(pipes: list[Pipe], progress: Progress) -> list[Part]:
    """Pass progress on until every process has sent its part."""
    parts: list[Part] = []
    waiting: list[Any] = list(pipes)
    while waiting:
        pipe: Any
        for pipe in wait(waiting):
            message = _received(pipe)
            if isinstance(message, Part):
                parts.append(message)
                waiting.remove(pipe)
            else:
                progress(*message)
    return parts


def _received(pipe: Any) -> Any:
    try:
        return pipe.recv()
    except (EOFError, ConnectionResetError):
        raise UserError("a process of the load generator died; its own words are above") from None


def _work(part: Part, rate: WordRate, pipe: Any) -> None:
    """Be one process of a run."""
    counted, told_at = [0, 0], [time.monotonic()]

    def told(found: Record) -> None:
        counted[0] += 1
        counted[1] += found.outcome != "ok"
        if time.monotonic() - told_at[0] > TELL_EVERY_S:
            pipe.send(tuple(counted))
            counted[:], told_at[0] = [0, 0], time.monotonic()

    workload = Workload(part.settings, rate)
    garbage.settle()
    pipe.send("ready")
    part.begin_at = pipe.recv()
    done = run_loop(drive.run(part, workload, told))
    pipe.send(tuple(counted))
    pipe.send(done)
