"""What faults cost: seconds from a kill to the next step, effective training time, resizes, a save's stall, logging.

    python benchmarks/recovery.py [--minutes 5] [--every 30] [--seed 0]

1. A worker of a ZeRO-3 job on two processes is killed every 30 s, at seeded moments and ranks. Effective training time
   is the share of the time that is not lost between a kill and the first step that had not been done before it. The
   steps that count times the median step, over the time, is printed as well: what disturbs steps counts against it.
2. On a cluster of three nodes of one CPU each, a node is killed and replaced: seconds until two workers train, and
   from the new node's start until three do.
3. A 14M Llama saves every 4 steps: how long the training thread waited, over how long the same save takes when it waits
   for all of it.
4. Seconds on the step's path for logging, over the step: MLflow up, frozen (accepts, never answers), killed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]


def main() -> None:
    """Run the four parts and print their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5, help="how long workers are killed (default 5)")
    parser.add_argument("--every", type=float, default=30, help="seconds between two kills (default 30)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="tr-", dir="/tmp"))
    os.environ["TANDEM_HOME"] = str(work)

    from cluster import local

    local.up(cpus=4, progress=lambda message: print(message, file=sys.stderr))
    try:
        kills(work, options)
        stall(work)
        logging_cost(work)
    finally:
        local.down()
    os.environ["TANDEM_HOME"] = str(work / "n")
    try:
        resizes(work / "n")
    finally:
        local.down()


def kills(work: Path, options: argparse.Namespace) -> None:
    """Kill workers while a job trains; print recovery times and the effective share."""
    from jobs import submit
    from tests.support.fault_runs import SPEC, workers

    steps = 1_000_000
    settings = {"steps": steps, "schedule": "constant"}
    spec = {
        **SPEC,
        "name": "kills",
        "training": {**SPEC["training"], **settings},
        "checkpoint": {"every_steps": 10},
        "max_failures": 1000,
    }
    path = work / "kills.yaml"
    path.write_text(yaml.safe_dump(spec))
    job = submit.submit(path, [])
    chance, killed = random.Random(options.seed), list[float]()
    wait_until(lambda: len(steps_of(work, "kills")) > 50, 120)
    began = time.time()
    due = began + options.every
    while time.time() - began < 60 * options.minutes:
        time.sleep(0.05)
        if time.time() < due:
            continue
        due += options.every
        if found := workers():
            chance.choice(sorted(found, key=lambda p: p.pid)).send_signal(signal.SIGKILL)
            killed.append(time.time())
            print(f"  kill {len(killed)}", file=sys.stderr)
    submit.stop(job)
    submit.follow(job, lambda line, meaning: None)
    records = [r for r in steps_of(work, "kills") if r["time_ms"] / 1000 >= began]
    next_step = [min(t for r in records if (t := r["time_ms"] / 1000) > kill + 0.5) - kill for kill in killed[:-1]]
    median = statistics.median(r["metrics"]["step_time_s"] for r in records)
    done = [(r["time_ms"] / 1000, r["step"]) for r in records]
    lost = sum(lost_s(done, kill) for kill in killed)
    counted, took = len({step for _, step in done}), done[-1][0] - began
    print(f"\nkill to next step      median {statistics.median(next_step):.1f} s, worst {max(next_step):.1f} s "
          f"({len(next_step)} kills)")  # fmt: skip
    print(f"repeated steps         {len(records) - counted} of {len(records)}")
    print(f"effective time         {1 - lost / took:.3f}   ({lost:.0f} of {took:.0f} s lost; "
          f"{counted * median / took:.3f} by {counted} steps of {1e3 * median:.0f} ms)")  # fmt: skip


def lost_s(done: list[tuple[float, int]], kill: float) -> float:
    """Return the seconds from a kill to the first step that is new; `done`: (time, step), in the order of time."""
    newest = max(step for at, step in done if at <= kill)
    return next((at for at, step in done if at > kill and step > newest + 1), done[-1][0]) - kill


def resizes(work: Path) -> None:
    """Kill a node of three and replace it; print how long an elastic job trains with fewer workers than it could."""
    from cluster import local, record
    from jobs import submit
    from tests.support.fault_runs import SPEC, forked_for

    local.up(nodes=2, cpus=1, cpus_per_node=1)
    spec = {
        **SPEC,
        "name": "elastic",
        "training": {**SPEC["training"], "steps": 1_000_000, "schedule": "constant", "deepspeed": {"zero_stage": 2}},
        "resources": {"workers": {"min": 1, "max": 3, "resize_every_s": 3}},
        "checkpoint": {"every_steps": 50},
    }
    path = work / "elastic.yaml"
    path.write_text(yaml.safe_dump(spec))
    job = submit.submit(path, [])
    wait_until(lambda: len(steps_of(work, "elastic")) > 50, 120)
    started = record.read()
    assert started is not None
    raylet = psutil.Process(started.raylets[-1])
    supervisor = psutil.Process(started.supervisors[-1])  # it would start the node again: here a machine is lost
    dead = [supervisor, raylet, *raylet.children(recursive=True), *forked_for(raylet)]
    for process in dead:
        with contextlib.suppress(psutil.NoSuchProcess):  # what the raylet's death has ended already
            process.kill()
    killed_at = time.time()
    wait_until(lambda: steps_of(work, "elastic")[-1]["metrics"]["workers"] == 2, 120)
    shrunk_s = time.time() - killed_at
    local.up(nodes=2, cpus=1, cpus_per_node=1)
    added_at = time.time()
    wait_until(lambda: steps_of(work, "elastic")[-1]["metrics"]["workers"] == 3, 120)
    grown_s = time.time() - added_at
    submit.stop(job)
    submit.follow(job, lambda line, meaning: None)
    print(f"resizes                3 → 2 workers {shrunk_s:.1f} s after a node's death, "
          f"2 → 3 {grown_s:.1f} s after another came")  # fmt: skip


def stall(work: Path) -> None:
    """Compare what a save costs the training thread with a save that it waits for."""
    import torch
    from training import job_spec

    from jobs import submit
    from jobs.checkpoint.catalog import Keep, Manifest
    from jobs.checkpoint.saver import Saver
    from jobs.checkpoint.shards import KINDS, Fragment
    from jobs.checkpoint.store import Store

    spec = {**job_spec("14M", 24), "name": "stall", "checkpoint": {"every_steps": 4, "keep": 2}}
    path = work / "stall.yaml"
    path.write_text(yaml.safe_dump(spec))
    outcome = submit.follow(submit.submit(path, []), lambda line, meaning: None)
    saved = [r["metrics"] for r in records_of(work, "stall") if "checkpoint_s" in r["metrics"]]
    stalled = statistics.median(m["checkpoint_stall_s"] for m in saved)
    numel = int(saved[0]["checkpoint_bytes"]) // 12 // 2  # one of two ranks
    state = [Fragment("all", 0, {kind: torch.zeros(numel) for kind in KINDS})]
    saver, times = Saver(Store(str(work / "sync")), "sync", 0, 1, Keep(2)), list[float]()
    for step in range(1, 7):
        at = time.perf_counter()
        saver.begin(Manifest(step, step, 1, 1), state)
        saver.finish()
        times.append(time.perf_counter() - at)
    waited = statistics.median(times[1:])
    print(f"checkpoint stall       {1e3 * stalled:.1f} ms of a synchronous save's {1e3 * waited:.0f} ms = "
          f"{100 * stalled / waited:.1f} %   ({outcome.status.lower()}, {len(saved)} saves)")  # fmt: skip


def logging_cost(work: Path) -> None:
    """Time appends to a spool whose sender faces a server that is up, frozen, killed."""
    from tracking.run import Run
    from tracking.spool import Spool, SpoolSender

    lines = {p: p.info["cmdline"] or [] for p in psutil.process_iter(["cmdline"])}
    (server,) = [p for p, line in lines.items() if "tracking.server" in line and str(work / "mlflow") in line]
    step_s = statistics.median(r["metrics"]["step_time_s"] for r in steps_of(work, "stall"))
    for state, number in (("up", None), ("frozen", signal.SIGSTOP), ("killed", signal.SIGKILL)):
        if number is not None:
            server.send_signal(number)
        spool = Spool(work / f"append-{state}" / "rank-0.jsonl")
        sender = SpoolSender(work / f"append-{state}", partial(Run.open, f"append-{state}", "append")).start()
        metrics, times = {f"metric_{i}": 0.123456789 * i for i in range(8)}, list[float]()
        for step in range(2000):
            at = time.perf_counter()
            spool.append(step, metrics)
            times.append(time.perf_counter() - at)
            time.sleep(0.002)
        sender.stop(0.1)
        mean = statistics.fmean(times)
        share = f"{1e3 * step_s:.0f} ms = {100 * mean / step_s:.4f} %"
        print(f"logging, MLflow {state:<7} {1e6 * mean:.0f} µs a step (worst {1e6 * max(times):.0f}) of {share}")


def records_of(work: Path, name: str) -> list[dict[str, Any]]:
    """Return what the first rank of a job has spooled."""
    found = sorted((work / "storage" / "runs").glob(f"{name}-*/spool/rank-0.jsonl"))
    lines = found[-1].read_bytes().split(b"\n") if found else []
    return [json.loads(line) for line in lines if line.endswith(b"}")]


def steps_of(work: Path, name: str) -> list[dict[str, Any]]:
    """Return the records of its steps, in the order in which they were done."""
    return [record for record in records_of(work, name) if "step_time_s" in record["metrics"]]


def wait_until(condition: Any, timeout_s: float) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit("the job did not start to train")
        time.sleep(0.1)


if __name__ == "__main__":
    main()
