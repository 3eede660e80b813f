"""One rank of a training job: what it works with, and how it is built."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from cluster.errors import UserError
from cluster.precision import Precision
from jobs import deaths, lease
from jobs.checkpoint import resume
from jobs.checkpoint.catalog import Keep
from jobs.checkpoint.fence import Fence, Superseded
from jobs.checkpoint.saver import GroupNotes, Saver
from jobs.checkpoint.store import Store
from jobs.data import batches
from jobs.data.prepare import Prepared, rows_of
from jobs.data.rows import Rows
from jobs.plan import facts
from jobs.run_folder import Attempt, Control, RunFolder
from jobs.spec import JobSpec, TrainingSpec
from jobs.tasks import Batch, Task
from jobs.tasks.shared_rows import SharesRows
from jobs.worker import (
    async_io,
    awaiting,
    buffers,
    compiling,
    heap,
    optimizers,
    planned,
    reference,
    sequence,
    sizing,
    start,
    swap,
    zero,
)
from jobs.worker.compiling import Compiling
from jobs.worker.config import WorkerConfig
from jobs.worker.deepspeed_engine import Engine, dtype_of, import_deepspeed
from jobs.worker.fault_injection import Injector
from jobs.worker.watchdog import Watchdog
from tracking.spool import Spool


@dataclass
class Worker:
    """What one rank works with."""

    spec: JobSpec
    training: TrainingSpec
    precision: Precision
    task: Task
    engine: Engine
    rows: Rows
    eval_rows: Rows
    folder: RunFolder
    spool: Spool | None
    saver: Saver
    watchdog: Watchdog
    injector: Injector
    steps: int
    micro_batch: int
    zero_stage: int
    start: int = 0
    updates: int = 0
    """Optimizer updates so far."""
    skip: frozenset[int] = frozenset()
    """Steps whose batch is left out."""
    short: int | None = None
    """The first step whose rows do not come: their preparation has failed, or was given up."""
    model_directory: Path | None = None
    data: str = ""
    """Digest of the rows it learns from."""
    order: int = batches.VERSION
    """Version of the order in which it visits them."""
    evaluations: dict[str, dict[str, float]] = field(default_factory=dict)
    shared: sequence.SharedRows | None = None
    """What the model attends with where other ranks share this one's rows."""

    @property
    def place(self) -> sequence.Place:
        """Where this rank stands among those that share rows."""
        return sequence.place(self.engine.rank, self.engine.world_size, self.training.parallel.sequence)

    def part(self, batch: Batch) -> Batch:
        """Return what of a micro-batch, with tensors of any shape, is this rank's."""
        if self.shared is None:
            return batch
        assert isinstance(self.task, SharesRows)
        return self.task.part(batch, self.place.part, self.place.parts)

    compiling: Compiling | None = None
    """Listens to the compiler, where the model is compiled."""
    until: int | None = None
    """A profile's last step, before the run's own: nothing is saved, and nothing measured on held-out rows."""

    @property
    def first(self) -> bool:
        """True on the rank that writes and reports."""
        return self.engine.rank == 0


def set_up(config: WorkerConfig, watchdog: Watchdog, swap_files: Path | None = None) -> Worker:
    """Build everything a rank needs, on the device that Ray Train assigned; `swap_files`: for offload to NVMe."""
    import ray.train
    import ray.train.torch

    import_deepspeed()  # before transformers imports it at full length
    spec, prepared, folder = config.spec, config.prepared, config.folder
    # A process that was started ahead did not know how many CPUs it would get, and took all.
    torch.set_num_threads(max(1, int(spec.resources.cpus_per_worker)))
    training = spec.training
    assert training is not None
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    readers = sequence.place(rank, world_size, training.parallel.sequence).readers
    task = prepared.task(spec)
    at_first = reference.without_missing(prepared)
    rows, eval_rows = both_rows(at_first, watchdog, rank == 0)
    store = Store(config.checkpoints)
    entry = enter_group(config, store, rank, readers)
    point, attempt = entry.point, entry.attempt
    device = ray.train.torch.get_device()
    ds_config = settings_of(config, training, attempt.micro_batch, readers, device)
    zero.check_base(spec.model.lora, ds_config)
    plan = planned.teller(config, task, device, rank)
    begun = start.begin(spec, task, config.parent, zero.sliceable(ds_config), dtype_of(ds_config) == torch.bfloat16)
    counted = facts.of(begun.model)
    plan(counted, entry.micro_batch)
    placed = with_swap_files(ds_config, swap_files, begun.model, watchdog)
    engine = make_engine(begun, training, placed, device, store, point)
    shared = look(begun, spec, task, engine, (rows, eval_rows), folder)
    if at_first is not prepared:
        reference.make_in_parts(engine, task, prepared, point.step, watchdog.during)
        rows, eval_rows = both_rows(prepared, watchdog, rank == 0)
    this = sizing.Sizing(config, task, rows, engine, ds_config["zero_optimization"], counted, attempt, watchdog)
    attempt = replace(attempt, micro_batch=sizing.settle(this, entry.micro_batch, entry.control), training=True)
    plan(counted, attempt.micro_batch if entry.micro_batch is None else None)
    if rank == 0:
        folder.write_attempt(attempt)
    injector = Injector(folder, rank, node=attempt.nodes[rank])
    return Worker(
        spec=spec,
        training=training,
        precision=config.precision,
        task=task,
        engine=engine,
        rows=rows,
        eval_rows=eval_rows,
        folder=folder,
        spool=Spool(folder.rank_0_spool) if rank == 0 else None,
        watchdog=watchdog,
        injector=injector,
        skip=frozenset(entry.control.skip),
        saver=saver_of(spec, task, store, entry, engine, injector),
        steps=total_steps(training, len(rows)),
        micro_batch=attempt.micro_batch,
        zero_stage=int(ds_config["zero_optimization"].get("stage", 0)),
        start=point.step,
        updates=point.manifest.updates if point.manifest else 0,
        compiling=begin_to_compile(engine, folder.compiled, watchdog) if training.compile else None,
        model_directory=config.parent,
        data=prepared.rows,
        order=entry.order,
        shared=shared,
    )


@dataclass(frozen=True)
class Entry:
    """With what a rank enters the group: the same on all ranks, but for the fence, which is rank 0's."""

    fence: Fence | None
    point: resume.Point
    order: int
    """Version of the order in which the run visits its rows."""
    control: Control
    micro_batch: int | None
    """None: it is to be found."""
    attempt: Attempt


def enter_group(config: WorkerConfig, store: Store, rank: int, readers: int) -> Entry:
    """Agree with the other ranks on where to go on, and leave what is known of this start in the folder. Collective.

    Raises:
        UserError: see `where_to_start` and `order_of`.
    """
    folder = config.folder
    control = folder.control()
    fence, point = where_to_start(config, store, rank)
    order = order_of(point, early=config.prepared.arriving is not None)
    known = sizing.known(config, control, readers)
    attempt = this_attempt(point.attempt, known or 1)
    say([f"skipped checkpoint {reason}" for reason in point.skipped], rank, folder)
    if rank == 0:
        folder.write_attempt(attempt)
    return Entry(fence, point, order, control, known, attempt)


def look(
    begun: start.Start, spec: JobSpec, task: Task, engine: Engine, rows: tuple[Rows, Rows], folder: RunFolder
) -> sequence.SharedRows | None:
    """Have the task look at the model, and say what was found; return what it attends with where ranks share rows."""
    model = engine.model.module
    looked = start.look(spec, task, model, rows[0].columns | rows[1].columns)
    shared = sequence.begin(spec, task, engine, rows[0])
    looked += [*(shared.said if shared else []), *optimizers.said(model, engine.matrices)]
    say([*begun.said, *looked, *buffers.said(model, engine.world_size)], engine.rank, folder)
    return shared


def saver_of(spec: JobSpec, task: Task, store: Store, entry: Entry, engine: Engine, injector: Injector) -> Saver:
    """Return what saves this rank's checkpoints."""
    metric = spec.checkpoint.metric
    keep = Keep(spec.checkpoint.keep, spec.checkpoint.keep_best, metric, task.metrics[metric])
    name, inject = entry.point.attempt, injector.inject
    return Saver(store, name, engine.rank, engine.world_size, keep, inject, GroupNotes(), entry.fence)


def with_swap_files(
    ds_config: dict[str, Any], folder: Path | None, model: torch.nn.Module, watchdog: Watchdog
) -> dict[str, Any]:
    """Return DeepSpeed's configuration with a folder for swap files, where the spec wants them and the node can.

    Args:
        model: before it is divided.

    Raises:
        UserError: the node lacks a library, a compiler, room on the disk or the right to lock memory.
    """
    import ray.train

    if folder is None:
        return ds_config
    with watchdog.during("build", learns=False):
        async_io.ready()
    context = ray.train.get_context()
    trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    swap.check_node(folder, trained, context.get_world_size(), context.get_local_world_size())
    return zero.with_swap_folder(ds_config, folder)


def begin_to_compile(engine: Engine, folder: Path, watchdog: Watchdog) -> Compiling:
    """Have the model run compiled, now that the task has looked at it; keep in `folder` what is compiled.

    Raises:
        UserError: it cannot be.
    """
    stage, deepcompile = engine.model.zero_optimization_stage(), engine.model.is_deepcompile_enabled()
    compiling.check(stage, engine.device.type == "cuda", deepcompile, os.environ)
    place = compiling.keep_in(folder, engine.device)
    engine.compile()
    return Compiling(watchdog, place)


def both_rows(prepared: Prepared, watchdog: Watchdog, say: bool) -> tuple[Rows, Rows]:
    """Open the rows to learn from, once the first are there, and those that are held out."""
    return awaiting.opened(prepared, watchdog, say), rows_of(prepared, prepared.eval_files)


def settings_of(
    config: WorkerConfig, training: TrainingSpec, micro_batch: int, readers: int, device: torch.device
) -> dict[str, Any]:
    """Return DeepSpeed's configuration for this group, in which `readers` ranks have rows of their own."""
    accumulation = batches.accumulation_steps(training.global_batch_size, readers, micro_batch)
    base, on_gpu = zero.read_named(training, config.base), device.type == "cuda"
    return zero.deepspeed_config(
        training, micro_batch, accumulation, precision=config.precision, on_gpu=on_gpu, base=base
    )


def say(sentences: Sequence[str], rank: int, folder: RunFolder) -> None:
    """Leave sentences for the job's log and its run, on rank 0 alone."""
    if rank == 0:
        folder.add_remarks(sentences)


def where_to_start(config: WorkerConfig, store: Store, rank: int) -> tuple[Fence | None, resume.Point]:
    """Agree with the other ranks on where to go on; rank 0 shuts earlier starts out first. Collective.

    Raises:
        UserError: another job has the run, or the newest checkpoint has learned from other rows.
    """
    # Entered before it looks: what it finds, nobody who was here before changes any more.
    fence = enter(config.folder, store, resume.attempt_name()) if rank == 0 else None
    point = resume.agree(store)
    check_data(point, config.prepared.rows)
    return fence, point


def check_data(point: resume.Point, rows: str) -> None:
    """Refuse a checkpoint that has learned from other rows; the driver has asked the run's folder, if that is whole.

    Raises:
        UserError: it has; nothing was loaded.
    """
    known = point.manifest.data if point.manifest else ""
    if known and rows and known != rows:
        raise UserError(
            f"the checkpoint at step {point.step} has learned from other rows (digest {known[:12]}) than these "
            f"({rows[:12]}): bring the data back as it was, or begin a new run with --set checkpoint.resume=never"
        )


def order_of(point: resume.Point, early: bool = False) -> int:
    """Return the version of the order in which the run visits its rows: its checkpoint's, or the newest one.

    Args:
        early: the run began, or may begin, before its rows are there.

    Raises:
        UserError: the checkpoint is of a later Tandem, whose order is not known here; nothing was loaded.
    """
    known = (batches.EARLY,) if early else range(1, batches.VERSION + 1)
    version = point.manifest.order if point.manifest else known[-1]
    if version in known:
        return version
    versions = f"version {batches.EARLY} for data.start_early" if early else f"versions 1 to {batches.VERSION}"
    raise UserError(
        f"the checkpoint at step {point.step} visits its rows in an order of version {version}, and this Tandem knows "
        f"{versions}: go on with the Tandem that wrote it, or begin a new run with --set checkpoint.resume=never"
    )


def enter(folder: RunFolder, store: Store, attempt: str) -> Fence:
    """Shut out every start of a group before this one; called on rank 0.

    Raises:
        Superseded: another job has taken the run over.
    """
    if folder.lease and lease.newest(folder.path) != folder.lease:
        raise Superseded(f"another job has taken the run {folder.key} over; its workers must not be shut out")
    return Fence.enter(store, attempt)


def this_attempt(name: str, micro_batch: int) -> Attempt:
    """Describe this start of the group, with where each rank is. Collective."""
    import ray

    mine = (ray.get_runtime_context().get_node_id(), os.getpid(), deaths.oom_kills())
    nodes, pids, kills = zip(*resume.gathered(mine), strict=True)
    return Attempt(name, len(nodes), micro_batch, nodes=nodes, pids=pids, oom_kills=kills)


def make_engine(
    begun: start.Start,
    training: TrainingSpec,
    ds_config: dict[str, Any],
    device: torch.device,
    store: Store,
    point: resume.Point,
) -> Engine:
    """Put the model into DeepSpeed, as it was at `point`: weights before it is divided, optimizer states after."""
    if point.manifest is None:
        engine = Engine(begun.model, training, ds_config, device, begun.fill)
        if begun.fill is not None:
            engine.make_exact(begun.fill)
    else:
        state = resume.reader(store, point.manifest)
        fill = resume.resumed(begun.model, begun.fill, state, store, point.manifest)
        engine = Engine(begun.model, training, ds_config, device, fill)
        engine.restore(state, point.manifest.updates)
    begun.close()
    if engine.sliceable:
        heap.trim()
    return engine


def total_steps(training: TrainingSpec, rows: int) -> int:
    """Return the optimiser steps of the run: as given, or what the epochs come to (a last partial step counts)."""
    return training.steps or max(1, math.ceil((training.epochs or 1) * rows / training.global_batch_size))
