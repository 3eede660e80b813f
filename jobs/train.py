"""The training loop, as each worker of the Ray Train group runs it.

set up: task, rows, model, engine; resume from the newest valid checkpoint
evaluate
for each step:
    for each of this rank's micro-batches:   loss / targets of the GLOBAL batch → backward
    sum the loss over ranks; stop before the update if it is not finite
    wait until a checkpoint that is being saved has been copied; clip, update
    write the step's metrics to the spool on disk
    now and then: evaluate; begin to save a checkpoint
evaluate, export the weights as safetensors
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
import traceback
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from jobs import batches, noise, resume, runs, zero
from jobs.checkpoint import Keep, Manifest
from jobs.engine import Engine, import_deepspeed
from jobs.evaluate import measure, to_device
from jobs.export import add_lora, export
from jobs.faults import Injector
from jobs.prepare import Prepared, rows_of
from jobs.rows import Rows
from jobs.saver import Saver
from jobs.schedules import learning_rate
from jobs.spec import JobSpec, TrainingSpec
from jobs.store import Store
from jobs.tasks import Batch, Task, get
from jobs.watchdog import Watchdog
from tracking.spool import Spool
from tracking.system import SystemSampler


class NonFiniteLoss(RuntimeError):
    """The loss is NaN or infinite; the step was not applied."""


class LossSpike(RuntimeError):
    """The loss is far above the last ones; the step was not applied."""


class Tee:
    """What is printed, to where it went before and to a file that outlives the cluster."""

    def __init__(self, stream: Any, file: IO[str]) -> None:
        self._stream, self._file = stream, file

    def write(self, text: str) -> int:
        """Write to both."""
        self._file.write(text)
        return int(self._stream.write(text) or 0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class RecentLosses:
    """Tell a spike from the losses before it."""

    LENGTH, ENOUGH = 64, 16

    def __init__(self, factor: float | None) -> None:
        """A loss of more than `factor` times the recent median is a spike; None: nothing is."""
        self._factor = factor
        self._losses: deque[float] = deque(maxlen=self.LENGTH)

    def is_spike(self, loss: float) -> bool:
        """Say whether `loss` is one; if not, remember it."""
        if self._factor is not None and len(self._losses) >= self.ENOUGH and loss > self._factor * self.median():
            return True
        self._losses.append(loss)
        return False

    def median(self) -> float:
        """Return the median of the recent losses."""
        return statistics.median(self._losses)


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
    saver: Saver
    watchdog: Watchdog
    faults: Injector
    steps: int
    micro_batch: int
    zero_stage: int
    start: int = 0
    updates: int = 0
    """Optimizer updates so far."""
    skip: frozenset[int] = frozenset()
    """Steps whose batch is left out."""
    model_directory: Path | None = None
    evaluations: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def first(self) -> bool:
        """True on the rank that writes and reports."""
        return self.engine.rank == 0


def train_worker(config: dict[str, Any]) -> None:
    """Train on this worker: the function Ray Train runs. `config`: spec, prepared, run, checkpoints, parent, base."""
    noise.quiet()
    with system_metrics(Path(config["run"]) / "spool"), logged(config) as watchdog:
        worker = set_up(config, watchdog)
        worker.engine.model.train()
        worker.faults.reach("start", worker.start)
        finished = train(worker)
        watchdog.allow()  # the last checkpoint may take longer than a step
        worker.saver.finish()
        report_checkpoints(worker)
        if finished:
            watchdog.allow()
            evaluate_now(worker, worker.steps, "final")
            export_weights(worker)
    if worker.spool is not None:
        worker.spool.close()


@contextmanager
def logged(config: dict[str, Any]) -> Iterator[Watchdog]:
    """Keep what this rank prints, its traceback, and its stacks should it hang, in the run's folder."""
    import ray.train

    run, rank = Path(config["run"]), ray.train.get_context().get_world_rank()
    name = f"{resume.attempt_name()}-rank-{rank}"
    (run / "logs").mkdir(exist_ok=True)
    watchdog = Watchdog(run / "stacks" / f"{name}.txt", config["spec"]["failures"]["hang_after_s"])
    with (run / "logs" / f"{name}.log").open("a", buffering=1) as file:
        tee_out, tee_err = Tee(sys.stdout, file), Tee(sys.stderr, file)
        try:
            with redirect_stdout(tee_out), redirect_stderr(tee_err):  # type: ignore[type-var]
                yield watchdog
        except BaseException:
            file.write(traceback.format_exc())
            raise
        finally:
            watchdog.stop()


def train(worker: Worker) -> bool:
    """Run the steps that are left. Return False when the driver asked to stop; a checkpoint was written then."""
    engine, training = worker.engine, worker.training
    if worker.start == 0:
        evaluate_now(worker, 0, "first")
    recent = RecentLosses(worker.spec.failures.loss_spike)
    previous = time.perf_counter()
    for step, (micro_batches, targets, data_wait_s) in prefetch(worker):
        rate = learning_rate(training, step, worker.steps)
        engine.set_learning_rate(rate)
        torch.manual_seed(step_seed(training.seed, step, engine.rank))
        loss, stop, save = forward_backward(worker, micro_batches, targets)
        if worker.faults.reach("step", step + 1) == "nan":
            loss = math.nan
        if not math.isfinite(loss):
            raise NonFiniteLoss(f"the loss of step {step + 1} is {loss}; the step was not applied")
        if recent.is_spike(loss):
            raise LossSpike(
                f"the loss of step {step + 1} is {loss:.4g}, after {recent.median():.4g}; it was not applied"
            )
        worker.saver.wait_copied()
        engine.step()
        worker.updates += 1
        done, now = step + 1, time.perf_counter()
        if worker.spool is not None:
            metrics = {"loss": loss, "learning_rate": rate, "gradient_norm": engine.gradient_norm()}
            metrics[f"{worker.task.unit}_per_second"] = targets / (now - previous)
            metrics["workers"] = float(engine.world_size)
            worker.spool.append(done, {**metrics, "step_time_s": now - previous, "data_wait_s": data_wait_s})
        worker.watchdog.step(now - previous)
        previous = now
        if training.eval_every and done % training.eval_every == 0 and done < worker.steps:
            worker.watchdog.allow()
            evaluate_now(worker, done, "latest")
            previous = time.perf_counter()
        every = worker.spec.checkpoint.every_steps
        if stop or save or (every and done % every == 0):
            worker.watchdog.allow()  # it waits for the one before, where the storage is slow
            begin_checkpoint(worker, done)
            if worker.first:
                (worker.run / runs.SAVE_FILE).unlink(missing_ok=True)
        report_checkpoints(worker)
        if stop and done < worker.steps:
            return False
    return True


def forward_backward(worker: Worker, micro_batches: list[Batch | None], targets: int) -> tuple[float, bool, bool]:
    """Accumulate one global batch's gradients; return its mean loss, whether to stop, and whether to save.

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
    asked = [float(worker.first and (worker.run / name).exists()) for name in (runs.STOP_FILE, runs.SAVE_FILE)]
    loss_sum, stop, save = engine.all_sum(total, *asked)
    return loss_sum / max(targets, 1), stop > 0, save > 0


def step_seed(seed: int, step: int, rank: int) -> int:
    """Return what seeds the dropout of a step on a rank, so that a resumed run draws what an unbroken one would."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def prefetch(worker: Worker) -> Iterator[tuple[int, tuple[list[Batch | None], int, float]]]:
    """Yield, per step, (this rank's micro-batches, targets of the global batch, seconds waited), one step ahead."""
    size = worker.training.global_batch_size
    order = batches.Order(len(worker.rows), worker.training.seed)
    steps = [step for step in range(worker.start, worker.steps) if step not in worker.skip]

    def fetch(step: int) -> tuple[list[Batch | None], int]:
        chosen = order.take(step * size, size)
        mine = batches.share(chosen, worker.engine.rank, worker.engine.world_size, worker.micro_batch)
        micro = [worker.task.collate(worker.rows.take(part)) if len(part) else None for part in mine]
        return micro, int(worker.rows.targets[chosen].sum())

    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
        upcoming = [pool.submit(fetch, step) for step in steps[:1]]
        for index, step in enumerate(steps):
            began = time.perf_counter()
            micro, targets = upcoming.pop().result()
            waited = time.perf_counter() - began
            upcoming += [pool.submit(fetch, following) for following in steps[index + 1 : index + 2]]
            yield step, (micro, targets, waited)


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


def begin_checkpoint(worker: Worker, step: int) -> None:
    """Begin to save the state after `step`. Every rank calls it; none waits for another."""
    engine = worker.engine
    evaluation = worker.evaluations.get("latest", {})
    manifest = Manifest(step, worker.updates, engine.world_size, worker.zero_stage, metrics=evaluation)
    extra = resume.buffers(engine.model.module) if worker.first else None
    worker.saver.begin(manifest, engine.owned_fragments(), extra)


def report_checkpoints(worker: Worker) -> None:
    """Spool how the saves went that have ended."""
    for outcome in worker.saver.outcomes():
        if outcome.error:
            print(f"the checkpoint of step {outcome.step} could not be saved: {outcome.error}", flush=True)
        if worker.spool is None:
            continue
        if outcome.error:
            worker.spool.append(outcome.step, {"checkpoint_failed": 1.0})
        else:
            taken = {"checkpoint_s": outcome.total_s, "checkpoint_stall_s": outcome.stalled_s}
            worker.spool.append(outcome.step, {**taken, "checkpoint_bytes": float(outcome.size)})


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


def set_up(config: dict[str, Any], watchdog: Watchdog) -> Worker:
    """Build everything a rank needs, on the device that Ray Train assigned."""
    import ray.train
    import ray.train.torch

    import_deepspeed()  # before transformers imports it at full length
    spec = JobSpec.model_validate(config["spec"])
    # A process that was started ahead did not know how many CPUs it would get, and took all.
    torch.set_num_threads(max(1, int(spec.resources.cpus_per_worker)))
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

    store = Store(config["checkpoints"])
    keep = Keep(spec.checkpoint.keep, spec.checkpoint.keep_best, spec.checkpoint.metric)
    control, faults = runs.read_control(run), Injector(run, rank)
    point = resume.agree(store)
    model = fresh_model(spec, task, parent)
    if spec.model.lora is not None:
        torch.manual_seed(training.seed)
        model = add_lora(model, spec.model.lora)
    state = resume.reader(store, point.manifest) if point.manifest else None
    if state is not None and point.manifest is not None:
        resume.load_model(model, state, store, point.manifest)
    wanted = control.micro_batch or training.micro_batch_size
    micro_batch = batches.micro_batch_size(wanted, training.global_batch_size, world_size)
    if rank == 0:
        runs.write_note(run, runs.Attempt(point.attempt, world_size, micro_batch))
    accumulation = batches.accumulation_steps(training.global_batch_size, world_size, micro_batch)
    base = (
        zero.read_deepspeed_json(Path(config["base"]) / training.deepspeed)
        if isinstance(training.deepspeed, str)
        else None
    )
    stage = zero.stage_of(training, base)
    ds_config = zero.deepspeed_config(training, micro_batch, accumulation, on_gpu=device.type == "cuda", base=base)
    engine = Engine(model, training, ds_config, device)
    if state is not None and point.manifest is not None:
        engine.restore(state, point.manifest.updates)
    if rank == 0:
        for reason in point.skipped:
            print(f"skipped checkpoint {reason}", flush=True)
        runs.write_note(run, runs.Attempt(point.attempt, world_size, micro_batch, training=True))
    return Worker(
        spec=spec,
        training=training,
        task=task,
        engine=engine,
        rows=rows,
        eval_rows=rows_of(prepared, prepared.eval_files),
        run=run,
        spool=Spool(run / "spool" / "rank-0.jsonl") if rank == 0 else None,
        watchdog=watchdog,
        faults=faults,
        skip=frozenset(control.skip),
        saver=Saver(store, point.attempt, rank, world_size, keep, faults.reach),
        steps=total_steps(training, len(rows)),
        micro_batch=micro_batch,
        zero_stage=stage,
        start=point.step,
        updates=point.manifest.updates if point.manifest else 0,
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


def _write_json(path: Path, values: Any) -> None:
    import json

    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(values), encoding="utf-8")
    os.replace(partial, path)
