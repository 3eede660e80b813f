"""`training.micro_batch_size: auto`: the most rows that fit a worker's memory, by the plan and by trial; remembered.

    a failure has halved it                 that many, and storage learns that more were too many
    the run has begun with so many workers  as many as then: `micro_batches.json` in its folder
    the plan needs a quarter of the memory  all rows of a worker: nothing is tried
    storage knows such workers              as what they measured says: `micro-batches/` in the storage
    else                                    trials (jobs/worker/trial.py), until the largest is known (rows_search.py)

All ranks take part and come to the same. The losses do not depend on it (jobs/data/batches.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cluster.errors import UserError
from jobs.checkpoint import resume
from jobs.data import batches
from jobs.data.rows import Rows
from jobs.plan import fit, memory
from jobs.plan.facts import Facts
from jobs.run_notes import Attempt, Control
from jobs.tasks import Task
from jobs.worker import buffers, growth, heap, remembered, rows_search, trial_internals
from jobs.worker.config import WorkerConfig
from jobs.worker.deepspeed_engine import Engine
from jobs.worker.growth import Growth
from jobs.worker.trial import Trial
from jobs.worker.watchdog import Watchdog
from jobs.worker.zero import offloads

GIB = 1 << 30
FOLDER = "micro-batches"
"""In the storage: what was measured, by what decides it."""
AS_WRITTEN = "; planned and tried as the model is written: compiled, it may take more or less"
"""A compiler would work for each size that is tried."""


@dataclass
class Sizing:
    """What a rank knows when the rows of a micro-batch are to be decided."""

    config: WorkerConfig
    task: Task
    rows: Rows
    engine: Engine
    zero: dict[str, Any]
    """DeepSpeed's `zero_optimization`."""
    facts: Facts
    """Of the model, before it was divided."""
    attempt: Attempt
    watchdog: Watchdog

    @property
    def of(self) -> int:
        """A rank's rows of a step."""
        assert self.config.spec.training is not None
        return batches.rows_of_rank(self.config.spec.training.global_batch_size, self.engine.world_size)

    @property
    def sharing(self) -> float:
        """How many ranks share this node's memory, or one GPU's."""
        if self.engine.device.type == "cuda":
            return max(1.0, 1 / self.config.spec.resources.gpus_per_worker)
        nodes = self.attempt.nodes
        return float(nodes.count(nodes[self.engine.rank]))

    def setting(self) -> memory.Setting:
        """Return how the model is trained, as a plan has it."""
        training = self.config.spec.training
        assert training is not None
        return memory.Setting(
            stage=int(self.zero.get("stage", 0)),
            offload="cpu" if offloads(self.zero) else "none",
            precision=self.config.precision,
            world_size=self.engine.world_size,
            on_gpu=self.engine.device.type == "cuda",
            checkpointing=training.gradient_checkpointing,
            optimizer=training.optimizer,
        )


@dataclass(frozen=True)
class Choice:
    """How many rows, and what to say of it."""

    rows: int
    said: str


def known(config: WorkerConfig, control: Control, world_size: int) -> int | None:
    """Return the rows of a micro-batch, or None where they are to be found. Collective where the spec says `auto`."""
    training = config.spec.training
    assert training is not None
    size = training.global_batch_size
    if training.micro_batch_size != "auto" or control.micro_batch:
        return batches.micro_batch_size(control.micro_batch or training.micro_batch_size, size, world_size)
    # Rank 0's: a shared disk may show the others what was there before.
    noted = resume.gathered(config.folder.choices.micro_batches().get(world_size))[0]
    of = batches.rows_of_rank(size, world_size)
    return 1 if of == 1 else None if noted is None else rows_search.even(noted, of)


def settle(this: Sizing, rows: int | None, control: Control) -> int:
    """Return the rows of a micro-batch, found unless they are known; the engine takes so many then. Collective.

    Args:
        rows: as `known` returns them.

    Raises:
        UserError: it is `auto`, and would change what the model learns.
    """
    training, folder, first = this.config.spec.training, this.config.folder, this.engine.rank == 0
    assert training is not None
    if training.micro_batch_size != "auto":
        assert rows is not None
        return rows
    check(this.engine.model.module, this.task)
    if control.micro_batch and first:
        remembered.too_many(place(this, trial_of(this)), 2 * control.micro_batch)
    if rows is None:
        choice = find(this, room_of(this))
        rows = choice.rows
        if first:
            folder.add_remarks([choice.said + (AS_WRITTEN if training.compile else "")])
    if first:
        folder.choices.keep_micro_batch(this.engine.world_size, rows)
    accumulation = batches.accumulation_steps(training.global_batch_size, this.engine.world_size, rows)
    trial_internals.set_accumulation(this.engine.model, rows, accumulation)
    return rows


def check(model: torch.nn.Module, task: Task) -> None:
    """Refuse a model or a task to which the size of a micro-batch makes a difference.

    Raises:
        UserError: it would decide what is learned.
    """
    layers = [f"{kind} normalises by the rows of a micro-batch" for kind in buffers.batch_normalisation(model)]
    if why := [*layers, *filter(None, [task.rows_meet()])]:
        raise UserError(
            f"training.micro_batch_size: auto: {'; '.join(why)}, so that its size decides what is learned, and what "
            "fits here need not fit elsewhere: give a number"
        )


def room_of(this: Sizing) -> int:
    """Return the bytes that passes may take on each rank: what the rank with the least has. Collective."""
    torch.distributed.barrier()  # all engines are there
    return min(resume.gathered(growth.free_bytes(this.engine.device, this.sharing) - _reserved(this)))


def find(this: Sizing, budget: int) -> Choice:
    """Find the rows by the plan, by what is remembered, and by trial. Collective.

    Args:
        budget: bytes that passes may take.
    """
    plan = fit.growth(this.facts, this.setting(), fit.row_tokens(this.task))
    if plan is not None and plan(this.of) * rows_search.AMPLE <= budget:
        return Choice(this.of, by_plan(this.of, plan(this.of), budget))
    known, trial, first = known_of(this, plan, budget), trial_of(this), this.engine.rank == 0
    memory_of = place(this, trial)
    tried = resume.gathered(remembered.read(memory_of))[0]
    before = len(tried)
    heap.fast()  # a trial measures what steps will take, and these have memory so
    while (rows := rows_search.following(tried, known)) is not None:
        if first:  # should the kernel end a rank for memory, half as many are next
            this.config.folder.write_attempt(replace(this.attempt, micro_batch=rows))
        with this.watchdog.during("trial", learns=False):
            tried[rows] = trial.took(rows)
    heap.lean()
    if first and len(tried) > before:
        remembered.write(memory_of, tried)
    rows = rows_search.even(rows_search.best(tried, budget), this.of)
    return Choice(rows, by_trial(rows, tried, known, len(tried) - before))


def known_of(this: Sizing, plan: Callable[[int], int] | None, budget: int) -> rows_search.Known:
    """Return what a search begins with.

    Args:
        plan: bytes that passes over so many rows take; None: the model's activations are not planned.
    """
    again = this.setting().checkpointing is not False
    if plan is None:
        return rows_search.Known(this.of, budget, again=again)
    planned = rows_search.expected(plan, budget, this.of)
    return rows_search.Known(this.of, budget, planned, plan(2) - plan(1), again)


def trial_of(this: Sizing) -> Trial:
    """Return what makes passes on this rank."""
    sources = tuple(source.train_rows for source in this.config.prepared.mixture)
    return Trial(this.engine, this.task, this.rows, Growth(this.engine.device), sources)


def place(this: Sizing, trial: Trial) -> Path:
    """Return where the storage keeps what is measured of such a model on such workers."""
    spec, device = this.config.spec, this.engine.device
    assert spec.training is not None
    what = {
        "model": spec.model.model_dump(mode="json", exclude={"source"}),
        "facts": asdict(this.facts),
        "task": spec.task.name,
        "row": {name: [*tensor.shape[1:], str(tensor.dtype)] for name, tensor in sorted(trial.batch(1).items())},
        "precision": this.config.precision,
        "zero": this.zero,
        "checkpointing": spec.training.gradient_checkpointing,
        "compile": spec.training.compile,
        "optimizer": spec.training.optimizer,
        "workers": this.engine.world_size,
        "sharing": this.sharing,
        "device": growth.kind(device),
        "torch": torch.__version__,
        "heap": heap.VERSION,
    }
    return this.config.storage / FOLDER / f"{remembered.digest(what)}.json"


def _reserved(this: Sizing) -> int:
    """Return what comes besides: moments that the first step makes, and on a CPU the copy that is written."""
    copied = 0 if this.engine.device.type == "cuda" else 12 * sum(this.engine.elements().values())
    return this.engine.unmade_bytes() + copied // this.engine.world_size


def by_plan(rows: int, planned: int, budget: int) -> str:
    """Say that nothing was tried. Pure."""
    return (
        f"training.micro_batch_size auto: all {rows} rows of a worker in one pass, planned at {planned / GIB:.2f} of "
        f"the {_room(budget)}; nothing had to be tried"
    )


def by_trial(rows: int, tried: rows_search.Tried, known: rows_search.Known, trials: int) -> str:
    """Say what was found. Pure.

    Args:
        trials: how many it took now.
    """
    passes = -(-known.of // rows)
    took = tried.get(max((each for each, found in tried.items() if each <= rows and found is not None), default=0))
    return "".join(
        [
            f"training.micro_batch_size auto: {rows} of a worker's {known.of} rows at a time, {passes} ",
            f"pass{'es' if passes != 1 else ''} a step, by ",
            f"{trials} trial{'s' if trials != 1 else ''}" if trials else "what such workers have measured before",
            "" if took is None else f": the longest rows take {took.peak / GIB:.2f} of the {_room(known.budget)}",
            ", so that memory may run out" if took is None or took.peak > known.budget else "",
            f"; the plan expected {known.planned} to fit" if known.each else "",
        ]
    )


def _room(budget: int) -> str:
    return f"{max(0, budget) / GIB:.2f} GiB that each worker may still take"
