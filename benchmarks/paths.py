"""Ways to take the same training step, side by side in one run: what pays on this machine?

    python benchmarks/paths.py                              on CPUs: a 4M Llama, two workers of one thread
    python benchmarks/paths.py --size 124M --length 1024    on GPUs, one a worker: GPT-2's size, or --size 1B
    python benchmarks/paths.py --only plain compile         some of the ways

Each way is a job of the same model, rows and seed, submitted as a user would, but for one thing: it is compiled, or
divided further, recomputed, trained by Muon, … Printed for each: tokens/s of the median step, its ratio to the plain
way, the share of the devices' peak (MFU, on GPUs that are known), the peak memory of a worker, and seconds from
submission to the first step. A way that is refused, or fails, says why in place of figures.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from training import ROOT, SIZES, VOCABULARY, WARM_UP, model_config, spooled

sys.path.insert(0, str(ROOT))
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "compile": {"training": {"compile": True}},
    "zero 2": {"training": {"deepspeed": {"zero_stage": 2}}},
    "zero 3": {"training": {"deepspeed": {"zero_stage": 3}}},
    "zero 3, compile": {"training": {"compile": True, "deepspeed": {"zero_stage": 3}}},
    "offload": {"training": {"deepspeed": {"zero_stage": 2, "offload": "cpu"}}},
    "checkpointing": {"training": {"gradient_checkpointing": True}},
    "selective": {"training": {"gradient_checkpointing": "selective"}},
    "muon": {"training": {"optimizer": "muon"}},
    "micro-batches of 1": {"training": {"micro_batch_size": 1}},
    "micro-batch auto": {"training": {"micro_batch_size": "auto"}},
    "documents apart": {"task": {"documents": "separate"}},
    "rows shared by 2": {"training": {"parallel": {"sequence": 2}}},
}
"""Name → what of the spec is another than the plain way's."""


@dataclass(frozen=True)
class Taken:
    """What one way took."""

    tokens_per_second: float
    mfu: float | None
    peak_bytes: float
    first_step_s: float


def main() -> None:
    """Take each way, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="4M")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row (default 256)")
    parser.add_argument("--rows", type=int, default=16, help="rows of a step (default 16)")
    parser.add_argument(
        "--steps", type=int, default=20, help=f"steps of each, {WARM_UP} of them to warm up (default 20)"
    )
    parser.add_argument("--workers", type=int, default=0, help="default: the GPUs of this machine, or two on CPUs")
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS), help="default: all")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="tb-", dir="/tmp"))
    os.environ["TANDEM_HOME"] = str(work)
    import torch

    from cluster import local

    gpus = torch.cuda.device_count()
    workers = options.workers or gpus or 2
    local.up(cpus=None if gpus else 2 * workers, progress=lambda message: print(message, file=sys.stderr))
    try:
        taken = {name: take(name, options, workers, gpus > 0, work) for name in options.only}
    finally:
        local.down()
    show(taken, f"{options.size} Llama, {options.rows} rows of {options.length} tokens a step, {workers} workers")


def take(name: str, options: argparse.Namespace, workers: int, on_gpu: bool, work: Path) -> Taken | str:
    """Run the job of one way; return what it took, or why it did not run."""
    from cluster.errors import UserError
    from jobs import submit

    path = work / "way.yaml"
    path.write_text(yaml.safe_dump(spec_of(name, options, workers, on_gpu)))
    print(f"{name} …", file=sys.stderr, flush=True)
    began = time.time()
    try:
        outcome = submit.follow(submit.submit(path, []), lambda line, meaning: None)
    except UserError as error:
        return " ".join(str(error).split())
    if outcome.status != "SUCCEEDED":
        errors = [line for line in outcome.log if line.startswith("error:")]
        return " ".join((errors or outcome.log or ["it failed"])[-1].split())
    return measured(Path(outcome.result["directory"]).parent, options, began)


def measured(run: Path, options: argparse.Namespace, began: float) -> Taken:
    """Return what a run's spool says of its steps."""
    records = spooled(run)
    steps = [record["metrics"] for record in records][WARM_UP:]
    rate = options.rows * options.length / statistics.median(step["step_time_s"] for step in steps)
    mfus = [step["mfu"] for step in steps if "mfu" in step]
    return Taken(rate, statistics.median(mfus) if mfus else None, peak_bytes(run), records[0]["time_ms"] / 1000 - began)


def peak_bytes(run: Path) -> float:
    """Return the most memory that any rank noted."""
    lines = (line for path in (run / "spool").glob("*.jsonl") for line in path.read_text().splitlines())
    metrics = (json.loads(line)["metrics"] for line in lines)
    return max((value for each in metrics for key, value in each.items() if key.startswith("peak_memory")), default=0.0)


def spec_of(name: str, options: argparse.Namespace, workers: int, on_gpu: bool) -> dict[str, Any]:
    """Return the job of one way."""
    spec: dict[str, Any] = {
        "name": "paths",
        "phase": "pretrain",
        "task": {
            "name": "causal-lm",
            "sequence_length": options.length,
            "tokenizer": {"train": "bpe", "vocab_size": VOCABULARY},
        },
        "model": {
            "architecture": "llama",
            "config": {**model_config(options.size), "tie_word_embeddings": True},
        },
        "data": {"train": "python-stdlib", "max_examples": 600, "eval_fraction": 0},
        "training": {
            "steps": options.steps,
            "global_batch_size": options.rows,
            "learning_rate": 1e-3,
            "deepspeed": {"zero_stage": 1},
        },
        "resources": {"workers": workers, "cpus_per_worker": 1, "gpus_per_worker": 1 if on_gpu else 0},
        "checkpoint": {"resume": "never"},
    }
    for section, changes in WAYS[name].items():
        spec[section] = {**spec[section], **changes}
    return spec


def show(taken: dict[str, Taken | str], what: str) -> None:
    """Print a line for each way."""
    print(f"\n{what}")
    print(f"  {'':<20} {'tokens/s':>10} {'ratio':>7} {'MFU':>6} {'peak, GiB':>10} {'first step':>11}")
    plain = taken.get("plain")
    for name, found in taken.items():
        if isinstance(found, str):
            print(f"  {name:<20} {found}")
            continue
        ratio = f"{found.tokens_per_second / plain.tokens_per_second:.2f}" if isinstance(plain, Taken) else "-"
        mfu = f"{found.mfu:.0%}" if found.mfu is not None else "-"
        peak = found.peak_bytes / (1 << 30)
        rate = f"{found.tokens_per_second:>10,.0f} {ratio:>7} {mfu:>6}"
        print(f"  {name:<20} {rate} {peak:>10.2f} {found.first_step_s:>9.0f} s")


if __name__ == "__main__":
    main()
