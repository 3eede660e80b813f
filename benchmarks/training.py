"""Training speed, side by side in one run: Tandem's loop, a bare DeepSpeed script, Hugging Face Trainer with DeepSpeed.

    python benchmarks/training.py [--steps 16] [--rounds 5] [--size 14M]

All three train the same random Llama on the same number of tokens with the same DeepSpeed configuration, two processes
of one thread each. The rounds alternate, so that the machine's own drift hits all alike; a rate is the median step's.
Printed: tokens/s of each, Tandem's ratio to the others, seconds from submission to the first step, and what logging
costs: the time of an append over that of a step, and the rate with tracking over the rate without.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SIZES = {
    "14M": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6},
    "4M": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4},
}
VOCABULARY, LENGTH, ROWS = 8192, 256, 16
WARM_UP = 5


def job_spec(size: str, steps: int) -> dict[str, Any]:
    """The job that all three run."""
    return {
        "name": "bench-training",
        "phase": "pretrain",
        "model": {
            "architecture": "llama",
            "config": {**SIZES[size], "vocab_size": VOCABULARY, "tie_word_embeddings": True},
        },
        "data": {
            "train": "python-stdlib",
            "max_examples": 150,
            "eval_fraction": 0,
            "sequence_length": LENGTH,
            "tokenizer": {"train": "bpe", "vocab_size": VOCABULARY},
        },
        "training": {"steps": steps, "global_batch_size": ROWS, "learning_rate": 1e-3, "deepspeed": {"zero_stage": 1}},
        "resources": {"workers": 2, "cpus_per_worker": 1},
        "checkpoint": {"resume": "never"},
    }


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=16, help="optimiser steps per measurement (default 16)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each (default 5)")
    parser.add_argument("--size", choices=SIZES, default="14M")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="tb-", dir="/tmp"))
    os.environ["TANDEM_HOME"] = str(work)

    from cluster import local

    local.up(cpus=4, progress=lambda message: print(message, file=sys.stderr))
    try:
        measured = measure(options, work)
    finally:
        local.down()
    show(measured, options)


def measure(options: argparse.Namespace, work: Path) -> dict[str, list[float]]:
    """Alternate the contestants; return tokens/s, and the other figures, of every round."""
    measured: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        measured.setdefault(name, []).append(value)
        print(f"  {name}: {value:,.4g}", file=sys.stderr, flush=True)

    for number in range(options.rounds):
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
        times, first_step_s = tandem_job(work, options)
        note("tandem", rate(times))
        note("submit to first step, s", first_step_s)
        note("deepspeed", rate(torchrun("bare_deepspeed.py", options)))
        note("hf trainer", rate(torchrun("hf_trainer.py", options)))
        note("tandem without tracking", rate(untracked(work, options)))
        note("append, µs", 1e6 * append_s(work))
    return measured


def rate(step_times_s: list[float]) -> float:
    """Tokens per second of the median step after the warm-up."""
    return ROWS * LENGTH / statistics.median(step_times_s[WARM_UP:])


def tandem_job(work: Path, options: argparse.Namespace) -> tuple[list[float], float]:
    """Submit the job as a user would, with MLflow; return its step times and the seconds to its first step."""
    from jobs import submit

    path = work / "bench.yaml"
    path.write_text(yaml.safe_dump(job_spec(options.size, options.steps)))
    began = time.time()
    outcome = submit.follow(submit.submit(path, []), lambda line, meaning: None)
    if outcome.status != "SUCCEEDED":
        raise SystemExit("\n".join(outcome.log))
    records = spooled(Path(outcome.result["directory"]).parent)
    return [r["metrics"]["step_time_s"] for r in records], records[0]["time_ms"] / 1000 - began


def spooled(run: Path) -> list[dict[str, Any]]:
    """Return the records of the steps in a run's spool."""
    lines = (run / "spool" / "rank-0.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "step_time_s" in record["metrics"]]


def untracked(work: Path, options: argparse.Namespace) -> list[float]:
    """Run the same worker group with nobody sending to MLflow; return its step times."""
    path, home = work / "untracked.yaml", str(work)
    path.write_text(yaml.safe_dump(job_spec(options.size, options.steps)))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TANDEM_HOME": home}
    command = [sys.executable, str(ROOT / "benchmarks" / "untracked.py"), str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return [r["metrics"]["step_time_s"] for r in spooled(Path(done.stdout.split()[-1]))]


def torchrun(script: str, options: argparse.Namespace) -> list[float]:
    """Run a rival in two processes of one thread; return its step times."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "times.json"
        settings = {"steps": options.steps, "model": {**SIZES[options.size], "vocab_size": VOCABULARY},
                    "rows": ROWS, "length": LENGTH, "result": str(result)}  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command += [str(ROOT / "benchmarks" / script), json.dumps(settings)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=folder)
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        return json.loads(result.read_text())


def append_s(work: Path) -> float:
    """Return the median seconds of one append of a step's seven metrics."""
    from tracking.spool import Spool

    spool = Spool(work / "append.jsonl")
    metrics = {f"metric_{i}": 0.123456789 * i for i in range(7)}
    times = []
    for step in range(1000):
        began = time.perf_counter()
        spool.append(step, metrics)
        times.append(time.perf_counter() - began)
    spool.close()
    return statistics.median(times)


def show(measured: dict[str, list[float]], options: argparse.Namespace) -> None:
    """Print medians, ranges and ratios; ratios are taken round by round."""
    print(
        f"\n{options.size} Llama, {ROWS}×{LENGTH} tokens a step, ZeRO-1 bf16, 2 processes × 1 thread, "
        f"{options.rounds} rounds"
    )
    for name in ("tandem", "deepspeed", "hf trainer", "tandem without tracking"):
        values = measured[name]
        print(f"  {name:<26} {statistics.median(values):>8,.0f} tokens/s   ({min(values):,.0f} to {max(values):,.0f})")
    for other in ("deepspeed", "hf trainer", "tandem without tracking"):
        ratios = [a / b for a, b in zip(measured["tandem"], measured[other], strict=True)]
        print(f"  tandem / {other:<24} {statistics.median(ratios):.3f}   ({min(ratios):.3f} to {max(ratios):.3f})")
    step_s = ROWS * LENGTH / statistics.median(measured["tandem"])
    append = statistics.median(measured["append, µs"])
    print(f"  submit to first step       {statistics.median(measured['submit to first step, s']):.1f} s")
    print(f"  logging on the step's path {append:.0f} µs of {1e3 * step_s:.0f} ms = {1e-4 * append / step_s:.4f} %")


if __name__ == "__main__":
    main()
