"""One rank of a training job: what it works with, and how it is built."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from cluster.precision import Precision
from jobs.checkpoint import resume
from jobs.checkpoint.catalog import Keep
from jobs.checkpoint.saver import GroupNotes, Saver
from jobs.checkpoint.store import Store
from jobs.data import batches, mixture
from jobs.data.prepare import Prepared, rows_of
from jobs.data.rows import Rows
from jobs.plan import facts
from jobs.run_folder import RunFolder
from jobs.run_notes import Attempt
from jobs.spec import JobSpec, TrainingSpec
from jobs.tasks import Batch, Task
from jobs.tasks.shared_rows import SharesRows
from jobs.worker import (
    async_io,
    awaiting,
    buffers,
    compiling,
    entry,
    heap,
    learned,
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
from jobs.worker.entry import Entry
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
    mixed: tuple[mixture.Part, ...] = ()
    """The sources that it mixes; none where the rows are of one."""
    learned: learned.Learned | None = None
    """Counts what comes from each of them."""
    held_out: Mapping[str, int] = field(default_factory=dict)
    """Each of them that has held-out rows, and how many, in the order of these."""
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

    copies: bool = False
    """Whether each node has a copy of the run's folder, and of all in it, of its own."""
    compiling: Compiling | None = None
    """Listens to the compiler, where the model is compiled."""
    until: int | None = None
    """A profile's last step, before the run's own: nothing is saved, and nothing measured on held-out rows."""

    @property
    def first(self) -> bool:
        """True on the rank that writes and reports."""
        return self.engine.rank == 0


def ready_process(spec: JobSpec) -> None:
    """Make the imports that have an order, and take the CPUs that are this worker's."""
    import_deepspeed()  # before transformers imports it at full length
    # A process that was started ahead did not know how many CPUs it would get, and took all.
    torch.set_num_threads(max(1, int(spec.resources.cpus_per_worker)))


def set_up(config: WorkerConfig, watchdog: Watchdog, swap_files: Path | None = None) -> Worker:
    """Build everything a rank needs, on the device that Ray Train assigned; `swap_files`: for offload to NVMe."""
    import ray.train
    import ray.train.torch

    spec, prepared, folder = config.spec, config.prepared, config.folder
    ready_process(spec)
    training = spec.training
    assert training is not None
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    readers = sequence.place(rank, world_size, training.parallel.sequence).readers
    task = prepared.task(spec)
    at_first = reference.without_missing(prepared, config.uri)
    (rows, eval_rows), mixed = both_rows(at_first, watchdog, rank == 0), prepared.sources(spec)
    store = Store(config.checkpoints)
    entered = entry.enter_group(config, store, rank, readers)
    point, attempt = entered.point, entered.attempt
    device = ray.train.torch.get_device()
    ds_config = settings_of(config, training, attempt.micro_batch, readers, device)
    plan = planned.teller(config, task, device, rank)
    begun = start.begin(spec, task, config.parent, zero.sliceable(ds_config), dtype_of(ds_config) == torch.bfloat16)
    counted = facts.of(begun.model)
    plan(counted, entered.micro_batch)
    engine = make_engine(begun, training, with_swap_files(ds_config, swap_files, begun, watchdog), device, store, point)
    shared = look(begun, spec, task, engine, (rows, eval_rows), folder)
    if at_first is not prepared:
        writes = rank == 0 or (bool(config.uri) and context.get_local_rank() == 0)
        reference.make_in_parts(engine, task, prepared, point.step, watchdog.during, config.uri, writes)
        rows, eval_rows = both_rows(prepared, watchdog, rank == 0)
    this = sizing.Sizing(config, task, rows, engine, ds_config["zero_optimization"], counted, attempt, watchdog)
    attempt = settled(this, entered, plan)
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
        skip=frozenset(entered.control.skip),
        saver=saver_of(spec, task, store, entered, engine, injector),
        steps=total_steps(training, len(rows)),
        micro_batch=attempt.micro_batch,
        zero_stage=int(ds_config["zero_optimization"].get("stage", 0)),
        start=point.step,
        updates=point.manifest.updates if point.manifest else 0,
        compiling=begin_to_compile(engine, folder.compiled, watchdog) if training.compile else None,
        model_directory=config.parent,
        data=prepared.rows,
        order=entered.order,
        mixed=mixed,
        held_out=prepared.held_out(),
        learned=learned.begin(mixed, point.manifest.learned if point.manifest else {}),
        shared=shared,
        copies=bool(config.token),
    )


def settled(this: sizing.Sizing, entered: Entry, plan: planned.Teller) -> Attempt:
    """Return this start of the group with the rows of a micro-batch, found now where that is asked for. Collective.

    Args:
        plan: is told of rows that were found.
    """
    found = sizing.settle(this, entered.micro_batch, entered.control)
    plan(this.facts, found if entered.micro_batch is None else None)
    attempt = replace(this.attempt, micro_batch=found, training=True)
    if this.engine.rank == 0:
        this.config.folder.write_attempt(attempt)
    return attempt


def look(
    begun: start.Start, spec: JobSpec, task: Task, engine: Engine, rows: tuple[Rows, Rows], folder: RunFolder
) -> sequence.SharedRows | None:
    """Have the task look at the model, and say what was found; return what it attends with where ranks share rows."""
    model = engine.model.module
    looked = start.look(spec, task, model, rows[0].columns | rows[1].columns)
    shared = sequence.begin(spec, task, engine, rows[0])
    looked += [*(shared.said if shared else []), *optimizers.said(model, engine.matrices)]
    entry.say([*begun.said, *looked, *buffers.said(model, engine.world_size)], engine.rank, folder)
    return shared


def saver_of(spec: JobSpec, task: Task, store: Store, entered: Entry, engine: Engine, injector: Injector) -> Saver:
    """Return what saves this rank's checkpoints."""
    metric = spec.checkpoint.metric
    keep = Keep(spec.checkpoint.keep, spec.checkpoint.keep_best, metric, task.metrics[metric])
    name, inject = entered.point.attempt, injector.inject
    return Saver(store, name, engine.rank, engine.world_size, keep, inject, GroupNotes(), entered.fence)


def with_swap_files(
    ds_config: dict[str, Any], folder: Path | None, begun: start.Start, watchdog: Watchdog
) -> dict[str, Any]:
    """Return DeepSpeed's configuration with a folder for swap files, where the spec wants them and the node can.

    Args:
        begun: before it is divided.

    Raises:
        UserError: parameters are to be in files, and workers begin the model whole; or the node lacks a library, a
            compiler, room on the disk or the right to lock memory.
    """
    import ray.train

    if folder is None:
        return ds_config
    files = swap.files_of(ds_config["zero_optimization"], begun.model, dtype_of(ds_config))
    if files.parameters:
        swap.check_in_parts(begun.model, begun.said)
    if files.states:
        with watchdog.during("build", learns=False):
            async_io.ready()
    context = ray.train.get_context()
    swap.check_nodes(folder, files, context.get_world_size(), context.get_local_world_size())
    return zero.with_swap_folder(ds_config, folder)


def begin_to_compile(engine: Engine, folder: Path, watchdog: Watchdog) -> Compiling:
    """Have the model run compiled, now that the task has looked at it; keep in `folder` what is compiled."""
    place = compiling.keep_in(folder, engine.device)
    engine.compile()
    return Compiling(watchdog, place)


def both_rows(prepared: Prepared, watchdog: Watchdog, say: bool) -> tuple[Rows, Rows]:
    """Open the rows to learn from, once the first are there, and those that are held out."""
    return awaiting.opened(prepared, watchdog, say), rows_of(prepared, prepared.eval_files)


def settings_of(
    config: WorkerConfig, training: TrainingSpec, micro_batch: int, readers: int, device: torch.device
) -> dict[str, Any]:
    """Return DeepSpeed's configuration for this group, in which `readers` ranks have rows of their own.

    Raises:
        UserError: the configuration does not go with a base held in few bits, or a compiled model; or this node cannot
            compile.
    """
    accumulation = batches.accumulation_steps(training.global_batch_size, readers, micro_batch)
    base, on_gpu = zero.read_named(training, config.base), device.type == "cuda"
    found = zero.deepspeed_config(
        training, micro_batch, accumulation, precision=config.precision, on_gpu=on_gpu, base=base
    )
    zero.check_base(config.spec.model.lora, found)
    if training.compile:  # before an engine is built
        compiling.check(found["zero_optimization"].get("stage", 0), on_gpu, os.environ)
    return found


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
