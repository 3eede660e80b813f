"""`training.deepspeed.zero_stage: auto`, decided once for a run: after its data, before its workers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster import devices, memory, topology
from cluster.errors import UserError
from cluster.memory import Memory
from jobs import progress
from jobs.data.prepare import Prepared
from jobs.driver.job import Job
from jobs.plan import fit
from jobs.plan.fit import Room
from jobs.plan.memory import Setting
from jobs.spec import JobSpec


@dataclass(frozen=True)
class Place:
    """A node that may take workers."""

    memory_bytes: int
    """Of one GPU where workers have one, else of the node."""
    most: int
    """Workers that it can take."""


def settle(job: Job, prepared: Prepared) -> None:
    """Put the stage in place of `auto` in the job's spec: as the run began, or the lowest that is planned to fit.

    Raises:
        UserError: no stage is.
    """
    if not fit.is_open(job.spec):
        return
    assert job.spec.training is not None
    offload = job.spec.training.deepspeed.offload  # type: ignore[union-attr]
    stage, said = as_begun(job.spec, job.folder.choices.zero_stage(offload))
    for sentence in said:
        progress.say(f"training.deepspeed.zero_stage auto: {sentence}")
    if stage is None:
        found = _decided(job, prepared)
        stage = found.stage
        progress.say(f"training.deepspeed.zero_stage auto: {found.sentence()}")
        job.folder.choices.keep_zero_stage(stage, offload)
    job.spec = fit.with_stage(job.spec, stage)


def as_begun(spec: JobSpec, noted: int | None) -> tuple[int | None, list[str]]:
    """Return the stage that a run goes on with, None where it is to be decided, and what is to be said. Pure.

    Args:
        noted: the stage that the run began with; None: it begins now.
    """
    if noted is None:
        return None, []
    if noted == 3 and (why := fit.undivided(spec, spec.resources.gpus_per_worker > 0)):
        return None, [f"the run began at stage 3, which is left out now: {why}"]
    return noted, [f"stage {noted}, as the run began"]


def _decided(job: Job, prepared: Prepared) -> fit.Fit:
    """Return the stage.

    Raises:
        UserError: none is planned to fit.
    """
    spec, training = job.spec, job.spec.training
    assert training is not None
    parent = Path(job.parent) if job.parent else None
    task = prepared.task(spec)
    found, tokens = fit.facts_of(spec, task, parent), fit.tokens_of_worker(training, task)
    of = Setting(
        stage=0,
        offload="none" if training.deepspeed.offload == "none" else "cpu",  # type: ignore[union-attr]
        precision=job.precision,
        world_size=1,
        on_gpu=spec.resources.gpus_per_worker > 0,
        checkpointing=training.gradient_checkpointing,
        optimizer=training.optimizer,
        micro_batches=fit.micro_batches(training, spec.resources.fewest),
        undivided=fit.undivided(spec, spec.resources.gpus_per_worker > 0),
    )
    rooms = rooms_of(spec, places(spec, job.placed), job.placed)
    best = fit.lowest_stage(found, of, tokens, fit.rows_to_try(training, spec.resources.fewest), rooms)
    if not best.fits:
        raise UserError(fit.refusal(best, found, of, tokens))
    if found.decoder is None:
        progress.say(f"what the layers of {found.kind} keep for the backward pass is not planned: only its weights are")
    return best


def places(spec: JobSpec, placed: Mapping[str, int]) -> dict[str, Place]:
    """Ask the nodes that take the workers, or could, what memory they have; return it by node id.

    Raises:
        UserError: none of them says so.
    """
    wanted = spec.resources
    nodes = placed or devices.able_to_hold(wanted.cpus_per_worker, wanted.gpus_per_worker)
    said = devices.said_by(nodes, memory.of_device, wanted.gpus_per_worker > 0)
    cpus = {node.node_id: node.total_cpus for node in topology.nodes()}
    found = {
        node_id: _place(has, cpus.get(node_id, 0), wanted.cpus_per_worker, wanted.gpus_per_worker)
        for node_id, has in said.items()
        if has is not None
    }
    if not found:
        raise UserError(
            "training.deepspeed.zero_stage: auto: no node says how much memory its workers would have; name a stage, 0 "
            "to 3"
        )
    return found


def _place(has: Memory, cpus: float, cpus_each: float, gpus_each: float) -> Place:
    share = min(1.0, gpus_each) if gpus_each else 1.0
    return Place(int(has.total * share), max(1, math.floor(cpus / cpus_each)))


def rooms_of(spec: JobSpec, nodes: Mapping[str, Place], placed: Mapping[str, int]) -> list[Room]:
    """Return what each worker has, for each size of the group that is sure to be looked at: the fewest and the most.

    A node's memory is shared by its workers; where it is not known yet which it takes, as many as it can. Pure.
    """
    wanted, on_gpu = spec.resources, spec.resources.gpus_per_worker > 0
    rooms = []
    for workers in sorted({wanted.fewest, wanted.most}):
        known = placed if sum(placed.values()) == workers else {}
        shares = [
            place.memory_bytes if on_gpu else place.memory_bytes // (known.get(node) or min(workers, place.most))
            for node, place in nodes.items()
        ]
        rooms.append(Room(workers, min(shares)))
    return rooms
