"""What Ray's other processes cost a step: within one job, they are stopped, or have another priority, for a while each.

    python benchmarks/beside.py [--stage 3] [--steps 150]      the model, rows and workers of benchmarks/training.py

Ways take turns of --seconds each:

    as it is           nothing is done
    daemons stopped    dashboard, agents, log monitor, MLflow's server (SIGSTOP)
    all stopped        these, the driver, Ray Train's controller and every other actor: all but the workers, the raylet
                       and the GCS
    others nicer       all of these at nice 10 (as root, who alone may take that back)
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
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
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
WORKERS_NICE = 15


@dataclass
class Processes:
    """Process ids by what they are."""

    workers: list[int] = field(default_factory=list)
    daemons: list[int] = field(default_factory=list)
    others: list[int] = field(default_factory=list)


def find(home: Path, cluster_marker: str) -> Processes:
    """Return the processes of the cluster in `home`, but the raylet and the GCS."""
    found = Processes()
    for process in psutil.process_iter():
        try:
            line, marked = " ".join(process.cmdline()), process.environ().get(cluster_marker) is not None
        except psutil.Error:
            continue
        if process.pid == os.getpid() or not (marked or str(home) in line) or any(name in line for name in CORE):
            continue
        kind = found.workers if WORKER in line else found.daemons if any(n in line for n in DAEMONS) else found.others
        kind.append(process.pid)
    return found


def signalled(pids: Iterable[int], number: signal.Signals) -> None:
    """Send a signal to processes of which some may be gone."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def niced(pids: Iterable[int], value: int) -> None:
    """Give every thread of some processes a priority."""
    for pid in pids:
        with suppress(FileNotFoundError, ProcessLookupError):
            for thread in os.listdir(f"/proc/{pid}/task"):
                os.setpriority(os.PRIO_PROCESS, int(thread), value)


Way = tuple[Callable[[Processes], None], Callable[[Processes], None]]
"""What is done at the beginning of a turn, and at its end."""
WAYS: dict[str, Way] = {
    "as it is": (lambda p: None, lambda p: None),
    "daemons stopped": (
        lambda p: signalled(p.daemons, signal.SIGSTOP),
        lambda p: signalled(p.daemons, signal.SIGCONT),
    ),
    "all stopped": (
        lambda p: signalled(p.daemons + p.others, signal.SIGSTOP),
        lambda p: signalled(p.daemons + p.others, signal.SIGCONT),
    ),
}
AS_ROOT: dict[str, Way] = {
    "others nicer": (lambda p: niced(p.daemons + p.others, 10), lambda p: niced(p.daemons + p.others, 0)),
    "workers at 0": (lambda p: niced(p.workers, 0), lambda p: niced(p.workers, WORKERS_NICE)),
}


def main() -> None:
    """Run the job and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), default=3, help="of ZeRO (default 3)")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seconds", type=float, default=14.0, help="of a turn (default 14)")
    parser.set_defaults(size="14M", workers=2, rows=16)
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="tb-", dir="/tmp"))
    os.environ["TANDEM_HOME"] = str(work)

    from cluster import local
    from cluster.processes import MARKER
    from jobs import submit

    local.up(cpus=4, progress=lambda message: print(message, file=sys.stderr))
    try:
        path = work / "beside.yaml"
        path.write_text(yaml.safe_dump(spec_of(options)))
        over, turns = threading.Event(), list[tuple[str, float, float]]()
        submitted = submit.submit(path, [])
        thread = threading.Thread(target=take_turns, args=(lambda: find(work, MARKER), options.seconds, over, turns))
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
        for name, (begin, end) in ways.items():
            processes = find_now()
            begin(processes)
            began = time.time()
            try:
                over.wait(seconds)
            finally:
                ended = time.time()
                end(processes)
            turns.append((name, began, ended))
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
