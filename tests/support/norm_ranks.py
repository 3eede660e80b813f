"""One of two ranks that train a small classifier with batch normalisation, evaluate it together and export it.

python tests/support/two_ranks.py norm_ranks FOLDER PRECISION…
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cluster.precision import Precision
from jobs.data.prepare import prepare, rows_of
from jobs.data.rows import Rows
from jobs.spec import JobSpec
from jobs.tasks import Task
from jobs.worker import proof
from jobs.worker.deepspeed_engine import Engine
from jobs.worker.evaluate import measure
from jobs.worker.export import export
from jobs.worker.zero import deepspeed_config

STEPS, ROWS = 4, 8
CPU = torch.device("cpu")
CONFIG = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic"}


def train(spec: JobSpec, task: Task, engine: Engine, rows: Rows, rank: int) -> list[bool]:
    """Train; return, for each step, whether the ranks' statistics differed before they were averaged."""
    differed = []
    for step in range(STEPS):
        mine = [(2 * step * ROWS + rank * ROWS + at) % len(rows) for at in range(ROWS)]
        loss, count = task.loss(engine.model, task.collate(rows.take(mine)))
        engine.backward(loss / (2 * count))
        engine.step()
        differed.append(len(set(statistics_of_all(engine))) > 1)
        engine.average_buffers()
        assert len(set(statistics_of_all(engine))) == 1
    return differed


def statistics_of_all(engine: Engine) -> list[float]:
    """Return the sum of every rank's running means and variances."""
    found: list[Any] = [None, None]
    mine = sum(b.double().sum().item() for name, b in engine.model.module.named_buffers() if "running" in name)
    dist.all_gather_object(found, mine)
    return found


def run(precision: Precision, rank: int, folder: Path) -> None:
    """Train, evaluate, export, and check the files as a job does."""
    spec = JobSpec.model_validate_json((folder / "spec.json").read_text())
    assert spec.training is not None
    prepared = prepare(spec, folder, folder / f"s{rank}", parent=None, on_progress=lambda *_: None)
    rows, held_out = (rows_of(prepared, files) for files in (prepared.train_files, prepared.eval_files))
    task = prepared.task(spec)
    torch.manual_seed(0)
    settings = deepspeed_config(spec.training, ROWS, 1, precision=precision, on_gpu=False)
    engine = Engine(task.build("resnet", CONFIG).train(), spec.training, settings, CPU)
    differed = train(spec, task, engine, rows, rank)
    sums = measure(
        task, engine.model, held_out, limit=None, seed=0, micro_batch=ROWS, device=CPU, rank=rank, world_size=2
    )
    loss = task.summarise(dict(zip(sums, engine.all_sum(*sums.values()), strict=True)))["loss"]
    weights = engine.state_dict()
    if weights is not None:
        trained = proof.Measured(loss, held_out, None, 0, ROWS, "the held-out rows")
        export(
            folder / precision, task, weights, lambda: task.build("resnet", CONFIG), precision, None,
            lambda written: proof.of_files(written, trained, task, precision, CPU),
        )  # fmt: skip
        tracked = sorted({int(b) for name, b in weights.items() if name.endswith("num_batches_tracked")})
        (folder / f"{precision}.json").write_text(json.dumps({"differed": differed, "tracked": tracked}))
    dist.barrier()
