"""The training loop, as each worker of the Ray Train group runs it.

set up: task, rows, model, engine; resume from the newest valid checkpoint
evaluate
for each step:
    for each of this rank's micro-batches:   loss / targets of the GLOBAL batch → backward
    sum the loss over ranks; stop before the update if it is not finite
    clip, update
    write the step's metrics to the spool on disk
    now and then: evaluate; save a checkpoint
evaluate, export the weights as safetensors
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jobs import batches, checkpoint, noise, zero
from jobs.engine import Engine, import_deepspeed
from jobs.evaluate import measure, to_device
from jobs.export import add_lora, export
from jobs.prepare import Prepared, rows_of
from jobs.rows import Rows
from jobs.schedules import learning_rate
from jobs.spec import JobSpec, TrainingSpec
from jobs.tasks import Batch, Task, get
from tracking.spool import Spool
from tracking.system import SystemSampler

STOP_FILE = "STOP"
"""The driver makes this file in the run's folder to ask for a checkpoint and an end."""


class NonFiniteLoss(RuntimeError):
    """The loss is NaN or infinite; the step was not applied."""


@dataclass
class Worker:
    """What one rank works with."""

    spec: JobSpec
    training: TrainingSpec
    task: Task
    engine: Engine
    rows: Rows
    eval_rows: Rows
    run: Path
    spool: Spool | None
    steps: int
    micro_batch: int
    zero_stage: int
    start: int = 0
    model_directory: Path | None = None
    evaluations: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def first(self) -> bool:
        """True on the rank that writes and reports."""
        return self.engine.rank == 0


def train_worker(config: dict[str, Any]) -> None:
    """Train on this worker: the function Ray Train runs. `config`: spec, prepared, run, parent, base."""
    noise.quiet()
    with system_metrics(Path(config["run"]) / "spool"):
        worker = set_up(config)
        worker.engine.model.train()
        finished = train(worker)
        if finished:
            evaluate_now(worker, worker.steps, "final")
            export_weights(worker)
    if worker.spool is not None:
        worker.spool.close()


def train(worker: Worker) -> bool:
    """Run the steps that are left. Return False when the driver asked to stop; a checkpoint was written then."""
    engine, training = worker.engine, worker.training
    if worker.start == 0:
        evaluate_now(worker, 0, "first")
    previous = time.perf_counter()
    for step, (micro_batches, targets, data_wait_s) in enumerate(prefetch(worker), worker.start):
        rate = learning_rate(training, step, worker.steps)
        engine.set_learning_rate(rate)
        loss, stop = forward_backward(worker, micro_batches, targets)
        if not math.isfinite(loss):
            raise NonFiniteLoss(f"the loss of step {step + 1} is {loss}; the step was not applied")
        engine.step()
        done, now = step + 1, time.perf_counter()
        if worker.spool is not None:
            metrics = {"loss": loss, "learning_rate": rate, "gradient_norm": engine.gradient_norm()}
            metrics[f"{worker.task.unit}_per_second"] = targets / (now - previous)
            worker.spool.append(done, {**metrics, "step_time_s": now - previous, "data_wait_s": data_wait_s})
        previous = now
        if training.eval_every and done % training.eval_every == 0 and done < worker.steps:
            evaluate_now(worker, done, "latest")
            previous = time.perf_counter()
        every = worker.spec.checkpoint.every_steps
        if stop or (every and done % every == 0):
            save_checkpoint(worker, done)
            previous = time.perf_counter()
        if stop and done < worker.steps:
            return False
    return True


def forward_backward(worker: Worker, micro_batches: list[Batch | None], targets: int) -> tuple[float, bool]:
    """Accumulate one global batch's gradients; return its mean loss and whether the driver asked to stop.

    The last micro-batch is left to `engine.step()` by the caller, after the loss has been looked at.
    """
    engine, task = worker.engine, worker.task
    total = torch.zeros((), device=engine.device)
    filler = next(batch for batch in reversed(micro_batches) if batch is not None) if any(micro_batches) else None
    for index, micro_batch in enumerate(micro_batches):
        # A rank without rows left still takes part in the collectives of the backward pass, with weight 0.
        batch = micro_batch or filler or task.collate(worker.rows.take(np.zeros(1, dtype=np.int64)))
        loss, _ = task.loss(engine.model, to_device(batch, engine.device))
        weighted = loss if micro_batch is not None else loss * 0.0
        engine.backward(weighted / max(targets, 1))
        total += weighted.detach()
        if index + 1 < len(micro_batches):
            engine.step()
    asked = worker.first and (worker.run / STOP_FILE).exists()
    loss_sum, stop = engine.all_sum(total, float(asked))
    return loss_sum / max(targets, 1), stop > 0


def prefetch(worker: Worker) -> Iterator[tuple[list[Batch | None], int, float]]:
    """Yield (this rank's micro-batches, targets of the global batch, seconds waited) per step, one step ahead."""
    size = worker.training.global_batch_size
    order = batches.Order(len(worker.rows), worker.training.seed)

    def fetch(step: int) -> tuple[list[Batch | None], int]:
        chosen = order.take(step * size, size)
        mine = batches.share(chosen, worker.engine.rank, worker.engine.world_size, worker.micro_batch)
        micro = [worker.task.collate(worker.rows.take(part)) if len(part) else None for part in mine]
        return micro, int(worker.rows.targets[chosen].sum())

    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
        upcoming = pool.submit(fetch, worker.start) if worker.start < worker.steps else None
        for step in range(worker.start, worker.steps):
            assert upcoming is not None
            began = time.perf_counter()
            micro, targets = upcoming.result()
            waited = time.perf_counter() - began
            upcoming = pool.submit(fetch, step + 1) if step + 1 < worker.steps else None
            yield micro, targets, waited


def evaluate_now(worker: Worker, step: int, label: str) -> None:
    """Measure the held-out rows and spool the result as `eval_…`. Collective."""
    if not len(worker.eval_rows):
        return
    engine = worker.engine
    sums = measure(
        worker.task,
        engine.model,
        worker.eval_rows,
        limit=worker.spec.data.eval_max_rows,
        micro_batch=max(worker.micro_batch, 8),
        device=engine.device,
        rank=engine.rank,
        world_size=engine.world_size,
    )
    metrics = worker.task.summarise(dict(zip(sums, engine.all_sum(*sums.values()), strict=True)))
    worker.evaluations[label] = metrics
    if worker.spool is not None:
        worker.spool.append(step, {f"eval_{key}": value for key, value in metrics.items()})


def save_checkpoint(worker: Worker, step: int) -> None:
    """Write a checkpoint of `step` and spool how long it took. Collective."""
    began = time.perf_counter()
    state = checkpoint.State(step, worker.engine.world_size, worker.zero_stage)
    checkpoint.save(worker.run / "checkpoints", worker.engine, state, worker.spec.checkpoint.keep)
    if worker.spool is not None:
        worker.spool.append(step, {"checkpoint_s": time.perf_counter() - began})


def export_weights(worker: Worker) -> None:
    """Write the trained model below the run's folder, with the evaluations beside it. Collective."""
    weights = worker.engine.state_dict()
    if weights is not None:
        export(
            worker.run / "model",
            worker.task,
            weights,
            lambda: fresh_model(worker.spec, worker.task, worker.model_directory),
            worker.training,
            worker.spec.model.lora,
        )
        _write_json(worker.run / "evaluations.json", worker.evaluations)
    torch.distributed.barrier()


def set_up(config: dict[str, Any]) -> Worker:
    """Build everything a rank needs, on the device that Ray Train assigned."""
    import ray.train
    import ray.train.torch

    import_deepspeed()  # before transformers imports it at full length
    spec = JobSpec.model_validate(config["spec"])
    training = spec.training
    assert training is not None
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    prepared = Prepared(**config["prepared"])
    run = Path(config["run"])
    task = get(spec.task).load(prepared.task_directory, spec.task_options())
    rows = rows_of(prepared, prepared.train_files)
    parent = Path(config["parent"]) if config["parent"] else None

    model = fresh_model(spec, task, parent)
    if spec.model.lora is not None:
        torch.manual_seed(training.seed)
        model = add_lora(model, spec.model.lora)
    micro_batch = batches.micro_batch_size(training.micro_batch_size, training.global_batch_size, world_size)
    accumulation = batches.accumulation_steps(training.global_batch_size, world_size, micro_batch)
    base = (
        zero.read_deepspeed_json(Path(config["base"]) / training.deepspeed)
        if isinstance(training.deepspeed, str)
        else None
    )
    stage = zero.stage_of(training, base)
    found, universal = find_checkpoint(spec, run, rank, world_size, stage)
    ds_config = zero.deepspeed_config(training, micro_batch, accumulation, on_gpu=device.type == "cuda", base=base)
    if universal:
        ds_config["checkpoint"] = {"load_universal": True}
    engine = Engine(model, training, ds_config, device)
    if found is not None:
        engine.load(universal or found.directory)
    return Worker(
        spec=spec,
        training=training,
        task=task,
        engine=engine,
        rows=rows,
        eval_rows=rows_of(prepared, prepared.eval_files),
        run=run,
        spool=Spool(run / "spool" / "rank-0.jsonl") if rank == 0 else None,
        steps=total_steps(training, len(rows)),
        micro_batch=micro_batch,
        zero_stage=stage,
        start=found.state.step if found else 0,
        model_directory=parent,
    )


@contextmanager
def system_metrics(directory: Path) -> Iterator[None]:
    """Sample this node's CPU, memory, disk, network and GPUs meanwhile, on the first rank of each node."""
    import ray.train

    context = ray.train.get_context()
    if context.get_local_rank():
        yield
        return
    node = f"node-{context.get_node_rank()}"
    spool = Spool(directory / f"system-{node}.jsonl")
    sampler = SystemSampler(spool, node).start()
    try:
        yield
    finally:
        sampler.stop()
        spool.close()


def fresh_model(spec: JobSpec, task: Task, parent: Path | None) -> torch.nn.Module:
    """Make the model the job starts from, in fp32 on the CPU: random weights by the seed alone, or the parent's."""
    assert spec.training is not None
    torch.manual_seed(spec.training.seed)
    if parent is not None:
        return task.load_model(parent, torch.float32, spec.model.config).train()
    assert spec.model.architecture is not None
    return task.build(spec.model.architecture, spec.model.config)


def total_steps(training: TrainingSpec, rows: int) -> int:
    """Return the optimiser steps of the run: as given, or what the epochs come to (a last partial step counts)."""
    return training.steps or max(1, math.ceil((training.epochs or 1) * rows / training.global_batch_size))


def find_checkpoint(
    spec: JobSpec, run: Path, rank: int, world_size: int, stage: int
) -> tuple[checkpoint.Checkpoint | None, Path | None]:
    """Agree on the checkpoint to resume from; convert it if the world size changed. Collective.

    Returns:
        The checkpoint, or None to start afresh; and the folder of its universal form where one is needed.
    """
    found: list[Any] = [None, None, None]
    if rank == 0:
        chosen, skipped = checkpoint.newest_valid(run / "checkpoints")
        for reason in skipped:
            print(f"skipped checkpoint {reason}", flush=True)
        found = [chosen, None, None]
        if chosen is not None and (chosen.state.world_size, chosen.state.zero_stage) != (world_size, stage):
            try:
                found[1] = checkpoint.to_universal(chosen)
            except RuntimeError as error:
                found[2] = str(error)
    if world_size > 1:
        torch.distributed.broadcast_object_list(found, src=0)
    if found[2]:
        raise RuntimeError(found[2])
    return found[0], found[1]


def _write_json(path: Path, values: Any) -> None:
    import json

    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(values), encoding="utf-8")
    os.replace(partial, path)
