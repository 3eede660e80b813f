"""One rank of benchmarks/plan.py: learns a few steps with the real engine and task, and leaves what they took.

python benchmarks/plan_rank.py RANK WORLD FOLDER STEPS        leaves FOLDER/rank-<rank>.json
"""

from __future__ import annotations

import importlib
import json
import pickle
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from cluster.precision import resolve, this_device
from jobs.checkpoint import resume
from jobs.checkpoint.store import Store
from jobs.data import batches
from jobs.data.prepare import rows_of
from jobs.spec import JobSpec
from jobs.tasks import Task
from jobs.worker import setup, start, zero
from jobs.worker.deepspeed_engine import Engine, dtype_of, import_deepspeed
from jobs.worker.peak_memory import own_status, peak_bytes, resident

CPU = torch.device("cpu")


def main(rank: int, world: int, folder: Path, steps: int) -> None:
    """Begin as a worker does, learn, and write down the peak memory by phase (bytes) and the median step (s)."""
    spec = JobSpec.model_validate(json.loads((folder / "spec.json").read_text()))
    training = spec.training
    assert training is not None
    torch.set_num_threads(max(1, int(spec.resources.cpus_per_worker)))
    import_deepspeed()
    importlib.import_module("transformers.modeling_utils")  # what a worker imports (jobs/driver/warm.py)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    prepared = pickle.loads((folder / "prepared").read_bytes())
    task, rows = prepared.task(spec), rows_of(prepared, prepared.train_files)
    micro = batches.micro_batch_size(training.micro_batch_size, training.global_batch_size, world)
    precision = resolve(training.precision, [this_device()])
    accumulation = batches.accumulation_steps(training.global_batch_size, world, micro)
    config = zero.deepspeed_config(training, micro, accumulation, precision=precision, on_gpu=False)
    peaks, process = {"imports": peak_bytes(CPU)}, resident(own_status())
    begun = start.begin(spec, task, None, zero.sliceable(config), dtype_of(config) == torch.bfloat16)
    peaks["begin"] = peak_bytes(CPU)
    store = Store(str(folder / "checkpoints"))
    engine = setup.make_engine(begun, training, config, CPU, store, resume.Point("plan"))
    peaks["divide"] = peak_bytes(CPU)
    start.look(spec, task, engine.model.module, rows.columns)
    peaks["look"] = peak_bytes(CPU)
    engine.model.train()
    order, times = batches.Order(len(rows), training.seed), list[float]()
    for step in range(steps):
        chosen = order.take(step * training.global_batch_size, training.global_batch_size)
        mine = [rows.take(part) for part in batches.share(chosen, rank, world, micro)]
        dist.barrier()
        began = time.perf_counter()
        learn(engine, task, mine, rows.targets(chosen))
        times.append(time.perf_counter() - began)
        peaks[f"step {step + 1}"] = peak_bytes(CPU)
    found = {"peaks": peaks, "process": process, "step_s": statistics.median(times[1:]), "precision": precision}
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    dist.barrier()


def learn(engine: Engine, task: Task, mine: list[dict[str, np.ndarray]], targets: int) -> None:
    """Take a step, as jobs/worker/loop.py does."""
    engine.set_learning_rate(1e-4)
    total = torch.zeros(())
    for index, part in enumerate(mine):
        loss, _ = task.loss(engine.model, task.collate(part))
        engine.backward(loss / targets)
        total += loss.detach()
        if index + 1 < len(mine):
            engine.step()
    engine.all_sum(total)
    engine.step()
    engine.gradient_norm()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
