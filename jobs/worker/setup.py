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
from jobs.data.prepare import rows_of
from jobs.data.rows import Rows
from jobs.run_folder import Attempt, RunFolder
from jobs.spec import JobSpec, TrainingSpec
from jobs.tasks import Task
from jobs.worker import async_io, buffers, heap, start, swap, zero
from jobs.worker.config import WorkerConfig
from jobs.worker.deepspeed_engine import Engine, import_deepspeed
from jobs.worker.fault_injection import Injector
from jobs.worker.watchdog import Pulse, Watchdog
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
    task = prepared.task(spec)
    rows = rows_of(prepared, prepared.train_files)
    store, control = Store(config.checkpoints), folder.control()
    fence, point = where_to_start(config, store, rank)
    order = order_of(point)
    wanted = control.micro_batch or training.micro_batch_size
    micro_batch = batches.micro_batch_size(wanted, training.global_batch_size, world_size)
    attempt = this_attempt(point.attempt, micro_batch)
    say([f"skipped checkpoint {reason}" for reason in point.skipped], rank, folder)
    if rank == 0:
        folder.write_attempt(attempt)
    eval_rows = rows_of(prepared, prepared.eval_files)
    device = ray.train.torch.get_device()
    ds_config = settings_of(config, training, micro_batch, world_size, device)
    if swap_files is not None:
        with watchdog.during("build", learns=False):
            async_io.ready()
        ds_config = zero.with_swap_folder(ds_config, swap_files)
    begun = start.begin(spec, task, config.parent, in_parts=zero.sliceable(ds_config))
    if swap_files is not None:
        trained = [parameter.numel() for parameter in begun.model.parameters() if parameter.requires_grad]
        swap.check_node(swap_files, trained, world_size, context.get_local_world_size())
    engine = make_engine(begun, training, ds_config, device, store, point)
    looked = start.look(spec, task, engine.model.module, rows.columns | eval_rows.columns)
    say([*begun.said, *looked, *buffers.said(engine.model.module, world_size)], rank, folder)
    if rank == 0:
        folder.write_attempt(replace(attempt, training=True))
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
        micro_batch=micro_batch,
        zero_stage=int(ds_config["zero_optimization"].get("stage", 0)),
        start=point.step,
        updates=point.manifest.updates if point.manifest else 0,
        model_directory=config.parent,
        data=prepared.rows,
        order=order,
    )


def settings_of(
    config: WorkerConfig, training: TrainingSpec, micro_batch: int, world_size: int, device: torch.device
) -> dict[str, Any]:
    """Return DeepSpeed's configuration for this group."""
    accumulation = batches.accumulation_steps(training.global_batch_size, world_size, micro_batch)
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
    watchdog = Watchdog(config.folder.stacks(attempt, rank), config.spec.failures.hang_after_s, pulse)
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
def swap_folder(config: WorkerConfig) -> Iterator[Path | None]:
    """Hold a folder for this rank's swap files, where the spec offloads to NVMe."""
    import ray.train

    rank = ray.train.get_context().get_world_rank()
    with swap.held(config.spec.training, config.folder.key, resume.attempt_name(), rank) as folder:
        yield folder


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
