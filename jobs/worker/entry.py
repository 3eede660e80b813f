"""How a rank enters the group: what all ranks agree on before anything is built, and the door shut behind rank 0."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.errors import UserError
from jobs import deaths, lease
from jobs.checkpoint import resume
from jobs.checkpoint.fence import Fence, Superseded
from jobs.checkpoint.store import Store
from jobs.data import batches, mixture
from jobs.run_folder import RunFolder
from jobs.run_notes import Attempt, Control
from jobs.worker import clocks, sizing
from jobs.worker.config import WorkerConfig


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
    control = resume.gathered(folder.control())[0]  # rank 0's: nodes with copies of the folder hear at their own time
    fence, point = where_to_start(config, store, rank)
    order = order_of(point, mixed=bool(config.prepared.mixture), early=config.prepared.arriving is not None)
    known = sizing.known(config, control, readers)
    attempt = this_attempt(point.attempt, known or 1)
    say([*(f"skipped checkpoint {reason}" for reason in point.skipped), *clocks.said()], rank, folder)
    if rank == 0:
        folder.write_attempt(attempt)
    return Entry(fence, point, order, control, known, attempt)


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


def order_of(point: resume.Point, mixed: bool = False, early: bool = False) -> int:
    """Return the version of the order in which the run visits its rows: its checkpoint's, or the newest one.

    Args:
        mixed: it mixes sources.
        early: the run began, or may begin, before its rows are there.

    Raises:
        UserError: the checkpoint is of a later Tandem, whose order is not known here; nothing was loaded.
    """
    known = [mixture.VERSION] if mixed else [batches.EARLY] if early else list(range(1, batches.VERSION + 1))
    version = point.manifest.order if point.manifest else known[-1]
    if version in known:
        return version
    of = " for data.mixture" if mixed else " for data.start_early" if early else ""
    raise UserError(
        f"the checkpoint at step {point.step} visits its rows in an order of version {version}, and this Tandem knows "
        f"version{'s' * (len(known) > 1)} {' and '.join(map(str, known))}{of}: go on with the Tandem that wrote it, or "
        "begin a new run with --set checkpoint.resume=never"
    )


def enter(folder: RunFolder, store: Store, attempt: str) -> Fence:
    """Shut out every start of a group before this one; called on rank 0.

    Raises:
        Superseded: another job has taken the run over.
    """
    taken = Superseded(f"another job has taken the run {folder.key} over; its workers must not be shut out")
    if folder.lease and lease.newest(folder.path) != folder.lease:
        raise taken
    fence = Fence.enter(store, attempt)
    if folder.lease and lease.newest(folder.path) != folder.lease:  # while this one entered
        fence.leave()
        raise taken
    return fence


def this_attempt(name: str, micro_batch: int) -> Attempt:
    """Describe this start of the group, with where each rank is. Collective."""
    import ray

    mine = (ray.get_runtime_context().get_node_id(), os.getpid(), deaths.oom_kills())
    nodes, pids, kills = zip(*resume.gathered(mine), strict=True)
    return Attempt(name, len(nodes), micro_batch, nodes=nodes, pids=pids, oom_kills=kills)
