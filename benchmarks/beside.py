"""What Ray's other processes cost a step: within one job, they are stopped, or have another priority, for a while each.

    python benchmarks/beside.py [--stage 3] [--steps 150]      the model, rows and workers of benchmarks/training.py

Ways take turns of --seconds each:

    as it is           nothing is done
    daemons stopped    dashboard, agents, log monitor, MLflow's server (SIGSTOP)
    all stopped        these, the driver, Ray Train's controller and every other actor: all but the workers, the raylet
                       and the GCS
    others nicer       of all of these those below nice 10 at 10 (as root, who alone may take that back)
    workers at 0       the workers at nice 0, where Ray starts them at 15 (as root)

Printed: the median step of each, of those that began and ended within a turn, and its ratio to `as it is`.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import yaml
from training import ROOT, WARM_UP, spec_of, spooled

sys.path.insert(0, str(ROOT))
WORKER, CORE = "RayTrainWorker", ("gcs_server", "raylet/raylet")
DAEMONS = (
    "dashboard",
    "log_monitor",
    "RuntimeEnvAgent",
    "DashboardAgent",
    "ray_client",
    "monitor.py",
    "tracking.server",
)


@dataclass
class Processes:
    """Process ids by what they are."""

    workers: list[int] = field(default_factory=list)
    daemons: list[int] = field(default_factory=list)
    others: list[int] = field(default_factory=list)


def find(cluster_id: str) -> Processes:
    """Return the processes of a cluster, but the raylet and the GCS."""
    from cluster.processes import MARKER

    found = Processes()
    for process in psutil.process_iter():
        try:
            line, marked = " ".join(process.cmdline()), process.environ().get(MARKER) == cluster_id
        except psutil.Error:
            continue
        if process.pid == os.getpid() or not marked or any(name in line for name in CORE):
            continue
        kind = found.workers if WORKER in line else found.daemons if any(n in line for n in DAEMONS) else found.others
        kind.append(process.pid)
    return found


@contextmanager
def stopped(pids: Iterable[int]) -> Iterator[None]:
    """Stop processes meanwhile, of which some may be gone."""
    try:
        _signalled(pids, signal.SIGSTOP)
        yield
    finally:
        _signalled(pids, signal.SIGCONT)


def _signalled(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


@contextmanager
def niced(pids: Iterable[int], change: Callable[[int], int]) -> Iterator[None]:
    """Change the priority of every thread of some processes meanwhile."""
    before = {}
    for pid in pids:
        with suppress(FileNotFoundError, ProcessLookupError):
            for thread in map(int, os.listdir(f"/proc/{pid}/task")):
                before[thread] = os.getpriority(os.PRIO_PROCESS, thread)
    try:
        _set({thread: change(value) for thread, value in before.items()})
        yield
    finally:
        _set(before)


def _set(priorities: dict[int, int]) -> None:
    for thread, value in priorities.items():
        with suppress(ProcessLookupError):
            os.setpriority(os.PRIO_PROCESS, thread, value)


Way = Callable[[Processes], AbstractContextManager[None]]
"""What is done for a turn."""
WAYS: dict[str, Way] = {
    "as it is": lambda found: nullcontext(),
    "daemons stopped": lambda found: stopped(found.daemons),
    "all stopped": lambda found: stopped(found.daemons + found.others),
}
AS_ROOT: dict[str, Way] = {
    "others nicer": lambda found: niced(found.daemons + found.others, lambda value: max(value, 10)),
    "workers at 0": lambda found: niced(found.workers, lambda value: 0),
}


def main() -> None:
    """Run the job and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), default=3, help="of ZeRO (default 3)")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seconds", type=float, default=14.0, help="of a turn (default 14)")
    parser.set_defaults(size="14M", workers=2, rows=16, length=256, compile=False)
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="tb-", dir="/tmp"))
    os.environ["TANDEM_HOME"] = str(work)

    from cluster import local, record
    from jobs import submit

    local.up(cpus=4, progress=lambda message: print(message, file=sys.stderr))
    try:
        path = work / "beside.yaml"
        path.write_text(yaml.safe_dump(spec_of(options)))
        over, turns = threading.Event(), list[tuple[str, float, float]]()
        submitted, running = submit.submit(path, []), record.read()
        assert running is not None, "it was begun above"
        turning = partial(take_turns, partial(find, running.id), options.seconds, over, turns)
        thread = threading.Thread(target=turning)
        thread.start()
        try:
            outcome = submit.follow(submitted, lambda line, meaning: None)
        finally:
            over.set()
            thread.join()
        show(spooled(Path(outcome.result["directory"]).parent), turns)
    finally:
        local.down()


def take_turns(
    find_now: Callable[[], Processes], seconds: float, over: threading.Event, turns: list[tuple[str, float, float]]
) -> None:
    """Do what each way does, in turns, once the workers are there; note from when to when each lasted."""
    ways = {**WAYS, **(AS_ROOT if os.geteuid() == 0 else {})}
    while not find_now().workers and not over.wait(1):
        pass
    while not over.is_set():
        for name, way in ways.items():
            with way(find_now()):
                began = time.time()
                over.wait(seconds)
                turns.append((name, began, time.time()))
            over.wait(1)


def show(records: list[dict[str, Any]], turns: list[tuple[str, float, float]]) -> None:
    """Print the median step of each way."""
    steps: dict[str, list[float]] = {}
    for record in records[WARM_UP:]:
        took, ended = record["metrics"]["step_time_s"], record["time_ms"] / 1000
        for name, begin, end in turns:
            if begin <= ended - took and ended <= end:
                steps.setdefault(name, []).append(took)
    plain = statistics.median(steps["as it is"])
    for name, times in steps.items():
        median = statistics.median(times)
        print(f"{name:16s} {len(times):4d} steps, median {median:.3f} s, {median / plain:.3f} of as it is")


if __name__ == "__main__":
    main()
