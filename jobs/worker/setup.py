"""One rank of a training job: what it works with, how it is built, and what of it outlives the cluster."""

from __future__ import annotations

import math
import os
import socket
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

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
from jobs.run_folder import Attempt, RunFolder
from jobs.spec import JobSpec, TrainingSpec
from jobs.tasks import Batch, Task
from jobs.tasks.shared_rows import SharesRows
from jobs.worker import buffers, compiling, heap, optimizers, planned, reference, sequence, sizing, start, zero
from jobs.worker.compiling import Compiling
from jobs.worker.config import WorkerConfig
from jobs.worker.deepspeed_engine import Engine, dtype_of, import_deepspeed
from jobs.worker.fault_injection import Injector
from jobs.worker.watchdog import MARGIN_S, Pulse, Watchdog
from tracking.spool import Spool
from tracking.system import SystemSampler


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


def set_up(config: WorkerConfig, watchdog: Watchdog) -> Worker:
    """Build everything a rank needs, on the device that Ray Train assigned."""
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
    rows, eval_rows = both_rows(at_first)
    store, control = Store(config.checkpoints), folder.control()
    fence, point = where_to_start(config, store, rank)
    order = order_of(point)
    known = sizing.known(config, control, readers)
    attempt = this_attempt(point.attempt, known or 1)
    say([f"skipped checkpoint {reason}" for reason in point.skipped], rank, folder)
    if rank == 0:
        folder.write_attempt(attempt)
    device = ray.train.torch.get_device()
    ds_config = settings_of(config, training, attempt.micro_batch, readers, device)
    zero.check_base(spec.model.lora, ds_config)
    plan = planned.teller(config, task, device, rank)
    begun = start.begin(spec, task, config.parent, zero.sliceable(ds_config), dtype_of(ds_config) == torch.bfloat16)
    counted = facts.of(begun.model)
    plan(counted, known)
    engine = make_engine(begun, training, ds_config, device, store, point)
    looked = start.look(spec, task, engine.model.module, rows.columns | eval_rows.columns)
    shared = sequence.begin(spec, task, engine, rows)
    looked += [*(shared.said if shared else []), *optimizers.said(engine.model.module, engine.matrices)]
    say([*begun.said, *looked, *buffers.said(engine.model.module, world_size)], rank, folder)
    if at_first is not prepared:
        reference.make_in_parts(engine, task, prepared, point.step, watchdog.during)
        rows, eval_rows = both_rows(prepared)
    this = sizing.Sizing(config, task, rows, engine, ds_config["zero_optimization"], counted, attempt, watchdog)
    attempt = replace(attempt, micro_batch=sizing.settle(this, known, control), training=True)
    plan(counted, attempt.micro_batch if known is None else None)
    if rank == 0:
        folder.write_attempt(attempt)
    metric, injector = spec.checkpoint.metric, Injector(folder, rank, node=attempt.nodes[rank])
    keep = Keep(spec.checkpoint.keep, spec.checkpoint.keep_best, metric, task.metrics[metric])
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
        skip=frozenset(control.skip),
        saver=Saver(store, point.attempt, rank, world_size, keep, injector.inject, GroupNotes(), fence),
        steps=total_steps(training, len(rows)),
        micro_batch=attempt.micro_batch,
        zero_stage=int(ds_config["zero_optimization"].get("stage", 0)),
        start=point.step,
        updates=point.manifest.updates if point.manifest else 0,
        compiling=begin_to_compile(engine, folder.compiled, watchdog) if training.compile else None,
        model_directory=config.parent,
        data=prepared.rows,
        order=order,
        shared=shared,
    )


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


def both_rows(prepared: Prepared) -> tuple[Rows, Rows]:
    """Open the rows to learn from, and those that are held out."""
    return rows_of(prepared, prepared.train_files), rows_of(prepared, prepared.eval_files)


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


def order_of(point: resume.Point) -> int:
    """Return the version of the order in which the run visits its rows: its checkpoint's, or the newest one.

    Raises:
        UserError: the checkpoint is of a later Tandem, whose order is not known here; nothing was loaded.
    """
    version = point.manifest.order if point.manifest else batches.VERSION
    if 1 <= version <= batches.VERSION:
        return version
    raise UserError(
        f"the checkpoint at step {point.step} visits its rows in an order of version {version}, and this Tandem knows "
        f"versions 1 to {batches.VERSION}: go on with the Tandem that wrote it, or begin a new run with "
        "--set checkpoint.resume=never"
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


@contextmanager
def logged(config: WorkerConfig) -> Iterator[Watchdog]:
    """Keep what this rank prints, its traceback, and its stacks should it hang, in the run's folder."""
    import ray
    import ray.train

    if not config.folder.path.is_dir():
        raise UserError(
            f"storage: {config.folder.path} is not there on the node {socket.gethostname()}: `storage` has to be a "
            "folder that all nodes share"
        )
    rank, attempt = ray.train.get_context().get_world_rank(), resume.attempt_name()
    pulse = Pulse(config.folder.pulse(attempt, rank), ray.get_runtime_context().get_node_id())
    compiles = config.spec.training is not None and config.spec.training.compile
    margin_s = compiling.MARGIN_S if compiles else MARGIN_S
    watchdog = Watchdog(config.folder.stacks(attempt, rank), config.spec.failures.hang_after_s, pulse, margin_s)
    file = config.folder.log(attempt, rank).open("a", buffering=1)
    tee_out, tee_err = Tee(sys.stdout, file), Tee(sys.stderr, file)
    try:
        with redirect_stdout(tee_out), redirect_stderr(tee_err):  # type: ignore[type-var]
            yield watchdog
    except BaseException:
        tee_err.keep(traceback.format_exc())
        raise
    finally:
        watchdog.stop()
        with suppress(OSError):  # a full disk does not take the last line
            file.close()


class Tee:
    """What is printed, to where it went before and to a file that outlives the cluster."""

    def __init__(self, stream: Any, file: IO[str]) -> None:
        self._stream, self._file = stream, file

    def write(self, text: str) -> int:
        """Write to both; a disk that is full costs the file a line, not the run its worker."""
        self.keep(text)
        return int(self._stream.write(text) or 0)

    def keep(self, text: str) -> None:
        """Write to the file alone."""
        with suppress(OSError):
            self._file.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


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
