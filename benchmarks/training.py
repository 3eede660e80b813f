"""Training speed, side by side in one run: Tandem's loop and what people would write or take instead.

    python benchmarks/training.py [--steps 16] [--rounds 5] [--size 14M] [--stage 1] [--workers 2] [--rows 16]
        [--beside deepspeed "hf trainer" ddp "ddp compiled" "tandem without tracking"]
    python benchmarks/training.py --size 124M --length 1024 --rows 32 --compile     where there are GPUs; or --size 1B

Beside it a bare DeepSpeed script, Hugging Face Trainer with DeepSpeed, and plain PyTorch with DistributedDataParallel,
compiled too. All train the same random Llama on the same number of tokens in the precision that `auto` picks, with the
same DeepSpeed configuration, one process a GPU, or of one thread where there is none. The rounds alternate, so that the
machine's own drift hits all alike; a rate is the median step's. The cluster is up meanwhile: what it takes of the
cores, it takes of all.

Printed: tokens/s of each, Tandem's ratio to the others, seconds from submission to the first step's beginning and end,
the parts of a step and on known GPUs the MFU, what processes that do not compute took meanwhile of one core (Ray's,
MLflow's, this one), and what logging costs: the time of an append over that of a step, and the rate with tracking over
the rate without.
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
from typing import Any, NamedTuple

import yaml
from others import Others

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SIZES = {
    "1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 20, "num_attention_heads": 16},
    "124M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
    "100M": {"hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 12, "num_attention_heads": 12},
    "14M": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6},
    "4M": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4},
}
VOCABULARY = 8192
"""Tokens of the tokenizer that the job trains."""
OUTPUTS = {"1B": 32_000, "124M": 50_304}
"""Tokens that a model of the size knows; others know the tokenizer's."""
WARM_UP = 5
PARTS = ("data_wait_s", "forward_s", "backward_s", "loss_sum_s", "communication_s", "optimizer_s", "mfu")
LOG = "job.log"
"""What Tandem's jobs print, with seconds since their submission."""
RIVALS = {
    "deepspeed": ("bare_deepspeed.py", {}),
    "hf trainer": ("hf_trainer.py", {}),
    "ddp": ("plain_ddp.py", {"compiled": False}),
    "ddp compiled": ("plain_ddp.py", {"compiled": True}),
}
"""Name → (script, what it is told besides)."""
UNTRACKED = "tandem without tracking"


def model_config(size: str) -> dict[str, int]:
    """The Llama of a size."""
    return {**SIZES[size], "vocab_size": OUTPUTS.get(size, VOCABULARY)}


def job_spec(
    size: str, steps: int, stage: int = 1, workers: int = 2, rows: int = 16, length: int = 256
) -> dict[str, Any]:
    """The job that all run, on CPUs."""
    return {
        "name": "bench-training",
        "phase": "pretrain",
        "model": {
            "architecture": "llama",
            "config": {**model_config(size), "tie_word_embeddings": True},
        },
        "data": {
            "train": "python-stdlib",
            "max_examples": 150,
            "eval_fraction": 0,
            "sequence_length": length,
            "tokenizer": {"train": "bpe", "vocab_size": VOCABULARY},
        },
        "training": {
            "steps": steps,
            "global_batch_size": rows,
            "learning_rate": 1e-3,
            "deepspeed": {"zero_stage": stage},
        },
        "resources": {"workers": workers, "cpus_per_worker": 1},
        "checkpoint": {"resume": "never"},
    }


def spec_of(options: argparse.Namespace) -> dict[str, Any]:
    """The job that is asked for."""
    spec = job_spec(options.size, options.steps, options.stage, options.workers, options.rows, options.length)
    spec["training"] |= {"compile": True} if options.compile else {}
    spec["resources"] |= {"gpus_per_worker": 1} if gpus() else {}
    return spec


def gpus() -> int:
    """How many GPUs torch sees here."""
    import torch

    return torch.cuda.device_count()


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=16, help="optimiser steps per measurement (default 16)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each (default 5)")
    parser.add_argument("--size", choices=SIZES, default="14M")
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), default=1, help="of ZeRO (default 1)")
    parser.add_argument("--workers", type=int, default=gpus() or 2, help="default: as many as GPUs, or two")
    parser.add_argument("--rows", type=int, default=16, help="rows of a step (default 16)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row (default 256)")
    parser.add_argument("--compile", action="store_true", help="Tandem's job, and the Trainer, by torch.compile")
    beside = (*RIVALS, UNTRACKED)
    parser.add_argument("--beside", nargs="+", choices=beside, default=beside, metavar="NAME", help="instead of all")
    options = parser.parse_args()
    if options.steps < WARM_UP + 3:
        parser.error(f"--steps {options.steps}: the first {WARM_UP} only warm up, so at least {WARM_UP + 3} are needed")
    work = Path(tempfile.mkdtemp(prefix="tb-", dir="/tmp"))
    print(f"what Tandem's jobs print: {work / LOG}", file=sys.stderr)
    os.environ["TANDEM_HOME"] = str(work)

    from cluster import local

    local.up(cpus=None if gpus() else 4, progress=lambda message: print(message, file=sys.stderr))
    try:
        with Others() as others:
            measured = measure(options, work, others)
    finally:
        local.down()
    show(measured, options)


def measure(options: argparse.Namespace, work: Path, others: Others) -> dict[str, list[float]]:
    """Alternate the contestants; return tokens/s, and the other figures, of every round."""
    measured: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        measured.setdefault(name, []).append(value)
        print(f"  {name}: {value:,.4g}", file=sys.stderr, flush=True)

    for number in range(options.rounds):
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
        job = tandem_job(work, options)
        note("tandem", rate(job.times_s, options))
        note("submit to first step, s", job.first_step_s)
        note("submit to first step's beginning, s", job.first_step_s - job.times_s[0])
        note("beside tandem", others.percent(job.steady, job.last_step, options.workers))
        for name, value in job.parts.items():
            note(name, value)
        print(f"  {plan_error()}", file=sys.stderr, flush=True)
        for name in [each for each in RIVALS if each in options.beside]:
            times, ended = torchrun(*RIVALS[name], options)
            note(name, rate(times, options))
            note(f"beside {name}", others.percent(ended - sum(times[WARM_UP:]), ended, options.workers))
        if UNTRACKED in options.beside:
            note(UNTRACKED, rate(untracked(work, options), options))
        note("append, µs", 1e6 * append_s(work))
    return measured


def rate(step_times_s: list[float], options: argparse.Namespace) -> float:
    """Tokens per second of the median step after the warm-up."""
    return options.rows * options.length / statistics.median(step_times_s[WARM_UP:])


class Job(NamedTuple):
    """What a job took."""

    times_s: list[float]
    first_step_s: float
    """From its submission to the end of the first step."""
    last_step: float
    """When that ended, in seconds since the epoch."""
    parts: dict[str, float]
    """Of the median step: seconds of its parts, by name, and `mfu` where the device is known."""

    @property
    def steady(self) -> float:
        """When the warm-up ended."""
        return self.last_step - sum(self.times_s[WARM_UP:])


def tandem_job(work: Path, options: argparse.Namespace) -> Job:
    """Submit the job as a user would, with MLflow."""
    from jobs import submit

    path = work / "bench.yaml"
    path.write_text(yaml.safe_dump(spec_of(options)))
    began = time.time()
    with (work / LOG).open("a", encoding="utf-8") as log:

        def note(line: str, _: object) -> None:
            print(f"{time.time() - began:7.1f} s  {line}", file=log, flush=True)

        outcome = submit.follow(submit.submit(path, []), note)
    if outcome.status != "SUCCEEDED":
        raise SystemExit("\n".join(outcome.log))
    records = spooled(Path(outcome.result["directory"]).parent)
    times = [record["metrics"]["step_time_s"] for record in records]
    ended = records[-1]["time_ms"] / 1000
    return Job(times, records[0]["time_ms"] / 1000 - began, ended, medians(records[WARM_UP:]))


def medians(records: list[dict[str, Any]]) -> dict[str, float]:
    """Return the median of each part of a step, and of its MFU."""
    found = {name: [record["metrics"].get(name) for record in records] for name in PARTS}
    known = {name: [value for value in values if value is not None] for name, values in found.items()}
    return {name: statistics.median(values) for name, values in known.items() if values}


def plan_error() -> str:
    """Say how far the plan of the last run was off."""
    from tracking import plan_errors

    found = plan_errors.compared(1)
    if not found:
        return "plan: not known"
    run = found[0]
    memory, step = (f"{each.error:+.1%}" if each.error is not None else "not known" for each in (run.memory, run.step))
    return f"plan: memory {memory}, step {step} ({run.layout})"


def spooled(run: Path) -> list[dict[str, Any]]:
    """Return the records of the steps in a run's spool."""
    lines = (run / "spool" / "rank-0.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "step_time_s" in record["metrics"]]


def untracked(work: Path, options: argparse.Namespace) -> list[float]:
    """Run the same worker group with nobody sending to MLflow; return its step times."""
    path, home = work / "untracked.yaml", str(work)
    path.write_text(yaml.safe_dump(spec_of(options)))
    environment = {**os.environ, "PYTHONPATH": import_path(), "TANDEM_HOME": home}
    command = [sys.executable, str(ROOT / "benchmarks" / "untracked.py"), str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return [r["metrics"]["step_time_s"] for r in spooled(Path(done.stdout.split()[-1]))]


def import_path() -> str:
    """Return where scripts find Tandem, and what this process has found besides."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def torchrun(script: str, told: dict[str, Any], options: argparse.Namespace) -> tuple[list[float], float]:
    """Run a rival in as many processes; return its step times, and when the last step had ended."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "times.json"
        settings = {"steps": options.steps, "model": model_config(options.size), "rows": options.rows,
                    "length": options.length, "stage": options.stage, "result": str(result), "on_gpu": gpus() > 0,
                    "compiled": options.compile, **told}  # fmt: skip
        on_cpu = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        environment = {**os.environ, "PYTHONPATH": import_path(), **({} if gpus() else on_cpu)}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.workers}"]
        command += [str(ROOT / "benchmarks" / script), json.dumps(settings)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=folder)
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        return json.loads(result.read_text()), result.stat().st_mtime


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
    from rival import precision_here

    where = "GPUs" if gpus() else "processes × 1 thread"
    print(
        f"\n{options.size} Llama, {options.rows}×{options.length} tokens a step, ZeRO-{options.stage} "
        f"{precision_here()}{', compiled' if options.compile else ''}, {options.workers} {where}, "
        f"{options.rounds} rounds"
    )
    for name in ("tandem", *options.beside):
        values = measured[name]
        print(f"  {name:<26} {statistics.median(values):>8,.0f} tokens/s   ({min(values):,.0f} to {max(values):,.0f})")
    for other in options.beside:
        ratios = [a / b for a, b in zip(measured["tandem"], measured[other], strict=True)]
        print(f"  tandem / {other:<24} {statistics.median(ratios):.3f}   ({min(ratios):.3f} to {max(ratios):.3f})")
    if "mfu" in measured:
        per_token = statistics.median(measured["mfu"]) / statistics.median(measured["tandem"])
        each = (f"{name} {per_token * statistics.median(measured[name]):.1%}" for name in ("tandem", *options.beside))
        print(f"  MFU                        {', '.join(each)}")
    parts = (f"{name} {1e3 * statistics.median(measured[name]):.1f}" for name in PARTS[:-1] if name in measured)
    print(f"  parts of tandem's step, ms {', '.join(parts)}")
    for name in [each for each in ("tandem", *RIVALS) if f"beside {each}" in measured]:
        print(f"  others beside {name:<12} {statistics.median(measured[f'beside {name}']):>8.1f} % of a core")
    step_s = options.rows * options.length / statistics.median(measured["tandem"])
    append = statistics.median(measured["append, µs"])
    first_s, began_s = (measured[f"submit to first step{what}, s"] for what in ("", "'s beginning"))
    print(f"  submit to first step       begins after {statistics.median(began_s):.1f} s, ends after ", end="")
    print(f"{statistics.median(first_s):.1f} s; the cluster's first job {began_s[0]:.1f}, {first_s[0]:.1f} s")
    print(f"  logging on the step's path {append:.0f} µs of {1e3 * step_s:.0f} ms = {1e-4 * append / step_s:.4f} %")


if __name__ == "__main__":
    main()
