"""Measure this machine's workers once: `tandem jobs plan --calibrate`. Starts processes; needs no cluster."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from cluster.errors import UserError
from cluster.precision import Precision
from jobs.checkpoint.torch_internals import HUGE_PAGES
from jobs.data.prepare import prepare
from jobs.plan.rates import Rates, kind_of_cpu, kind_of_gpu
from jobs.spec import JobSpec

RANK = "jobs.plan.calibrate_rank"
LIMIT_S = 600
"""A measurement that takes longer has failed."""
STAGES = (0, 1, 2, 3)
SMALLEST = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "num_attention_heads": 1}
"""The model of an engine whose own time and memory are to be seen."""


def worlds(cores: int, threads: int) -> list[int]:
    """Return how many workers are measured at once: one, and two where the machine has cores for them. Pure."""
    return [1, 2] if cores >= 2 * threads else [1]


def measure(
    precision: Precision, threads: int, on_gpu: bool = False, say: Callable[[str], None] = lambda said: None
) -> Iterator[Rates]:
    """Measure workers of so many threads on this machine, one alone and two together; takes some minutes.

    Args:
        on_gpu: each has a GPU, else CPUs alone.
        say: is told what is measured next.

    Raises:
        UserError: a process failed.
    """
    kind = kind_of_gpu() if on_gpu else kind_of_cpu()
    device = "cuda" if on_gpu else "cpu"
    for world in worlds(torch.cuda.device_count(), 1) if on_gpu else worlds(os.cpu_count() or 1, threads):
        say(f"{world} worker{'s' * (world > 1)} of {threads} thread{'s' * (threads > 1)}, {precision}: rates")
        rates = _first(_run(world, threads, ["rates", precision, device]))
        overhead, process, engine = [], [], []
        for stage in STAGES:  # an engine leaves hooks behind, so each has a process
            say(f"{world} worker{'s' * (world > 1)}: ZeRO {stage}")
            found = _first(_run(world, threads, ["engine", precision, device], stage))
            overhead.append(found["overhead_s"])
            process.append(int(found["process_bytes"]))
            engine.append(int(found["engine_bytes"]))
        rates |= {"overhead_s": overhead, "process_bytes": max(process), "engine_bytes": max(engine)}
        yield Rates(kind=kind, precision=precision, threads=threads, workers=world, **rates)


def _first(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the first rank's figures: all have the same load."""
    return ranks[0]


def _prepared(folder: Path, stage: int, precision: Precision) -> None:
    """Leave a job and its rows in a folder."""
    values = {
        "name": "calibration",
        "phase": "pretrain",
        "task": {"name": "causal-lm", "sequence_length": 32, "tokenizer": {"train": "bpe", "vocab_size": 300}},
        "data": {"train": "x.jsonl", "eval_fraction": 0},
        "model": {"architecture": "llama", "config": SMALLEST},
        "training": {"steps": 1, "precision": precision, "deepspeed": {"zero_stage": stage}},
    }
    (folder / "spec.json").write_text(json.dumps(values))
    (folder / "x.jsonl").write_text("\n".join(json.dumps({"text": f"{n} men went to mow"}) for n in range(100)))
    found = prepare(JobSpec.model_validate(values), folder, folder / "s", parent=None, on_progress=lambda *_: None)
    (folder / "prepared").write_bytes(pickle.dumps(found))


def _run(world: int, threads: int, arguments: list[str], stage: int | None = None) -> list[dict[str, Any]]:
    """Run as many processes of jobs/plan/calibrate_rank.py, and return what each measured."""
    environment = {**os.environ, **HUGE_PAGES, "OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": arguments[-1]}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [_root(), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory(prefix="tandem-calibrate-") as folder:
        if stage is not None:
            _prepared(Path(folder), stage, arguments[1])  # type: ignore[arg-type]
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", RANK, str(rank), str(world), folder, *arguments],
                env={**environment, "LOCAL_RANK": str(rank)},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(world)
        ]
        try:
            errors = [rank.communicate(timeout=LIMIT_S)[1] for rank in ranks]
        finally:
            for rank in ranks:
                if rank.poll() is None:
                    rank.kill()
        if any(rank.returncode for rank in ranks):
            last = next(error for rank, error in zip(ranks, errors, strict=True) if rank.returncode).strip()
            raise UserError(f"--calibrate: measuring {arguments[0]} failed: {last.splitlines()[-1] if last else '?'}")
        return [json.loads((Path(folder) / f"rank-{rank}.json").read_text()) for rank in range(world)]


def _root() -> str:
    return str(Path(__file__).resolve().parents[2])
