"""What fits by the plan: the lowest ZeRO stage for a group of workers, and the largest micro-batch for one. Estimates.

`training.deepspeed.zero_stage: auto` is decided by `lowest_stage`, for `tandem jobs plan` as for a job's driver. The
plan's part in `training.micro_batch_size: auto` is `growth`; jobs/worker/sizing.py does the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from jobs.data.batches import accumulation_steps, micro_batch_size
from jobs.plan import facts, memory
from jobs.plan.facts import Facts
from jobs.plan.memory import Setting
from jobs.spec import JobSpec, TrainingSpec
from jobs.tasks import Task, loading
from jobs.worker import lora, start

GIB = 1 << 30
MOST_WORKERS = 4096
"""So many are thought of where a model does not fit fewer."""


@dataclass(frozen=True)
class Room:
    """What each worker of a group has."""

    workers: int
    memory_bytes: int
    """Of the device that computes."""


@dataclass(frozen=True)
class Fit:
    """A stage, and what it was judged by."""

    stage: int
    rows: int
    """Of the micro-batch that was counted with."""
    peak: int
    """Bytes that a worker is planned to need, of the group that has the least to spare."""
    room: Room
    """What that group has."""
    fits: bool = True
    """False: no stage does, and this is the one that lacks least."""

    @property
    def usable(self) -> int:
        """Bytes of its memory that a worker may take."""
        return int(self.room.memory_bytes * (1 - memory.FREE))

    @property
    def missing(self) -> int:
        """Bytes that it needs beyond that; negative: what is to spare."""
        return self.peak - self.usable

    def sentence(self) -> str:
        """Say what was chosen, and why."""
        return (
            f"ZeRO stage {self.stage}: the lowest whose peak is within what a worker has: {self.peak / GIB:.2f} of "
            f"{self.usable / GIB:.2f} GiB (a tenth is left free), planned with micro-batches of {self.rows} on "
            f"{_workers(self.room.workers)}"
        )


def undivided(spec: JobSpec, on_gpu: bool) -> str:
    """Return why a job's weights are not to be divided by stage 3, in words; empty where they may be. Pure."""
    lora, training = spec.model.lora, spec.training
    if lora is not None and lora.base != "whole":
        return f"model.lora.base: {lora.base} is held whole by every worker"
    if training is not None and training.compile and not on_gpu:
        return "training.compile: on CPUs it would be compiled again at each hook that gathers weights"
    return ""


def stages(of: Setting) -> Sequence[int]:
    """Return the stages that `auto` may choose from: without ZeRO, DeepSpeed moves nothing to where there is room."""
    return of.stages if of.offload == "none" else of.stages[1:]


def lowest_stage(found: Facts, of: Setting, row_tokens: int, rows: Sequence[int], rooms: Sequence[Room]) -> Fit:
    """Return the lowest stage whose planned peak fits all groups of workers, or the one that lacks least.

    Args:
        of: how it is trained; stage, workers and tokens are filled in.
        row_tokens: tokens of a row, 0 where rows are none.
        rows: sizes of the micro-batch, the best one first; a later one is taken where no stage fits the ones before.
        rooms: each size of the group that the job may have.
    """
    assert rows, "no micro-batch to plan with"
    assert rooms, "no workers to plan for"
    judged = [
        max((_judged(found, of, stage, row_tokens, each, room) for room in rooms), key=lambda fit: fit.missing)
        for each in rows
        for stage in stages(of)
    ]
    fitting = next((fit for fit in judged if fit.fits), None)
    return fitting or min(judged, key=lambda fit: (fit.missing, fit.stage))


def _judged(found: Facts, of: Setting, stage: int, row_tokens: int, rows: int, room: Room) -> Fit:
    need = memory.need(found, replace(of, stage=stage, world_size=room.workers, tokens=rows * row_tokens))
    return Fit(stage, rows, need.peak, room, need.fits(room.memory_bytes))


def rows_to_try(training: TrainingSpec, workers: int) -> list[int]:
    """Return the sizes of the micro-batch to plan with: the spec's, or for `auto` up to 16, halved and halved again."""
    rows = [micro_batch_size(training.micro_batch_size, training.global_batch_size, _readers(training, workers))]
    while training.micro_batch_size == "auto" and rows[-1] > 1:
        rows.append(rows[-1] // 2)
    return rows


def micro_batches(training: TrainingSpec, workers: int) -> int:
    """Return the most micro-batches of a step with any size of `rows_to_try`: from two on gradients wait for others."""
    readers = _readers(training, workers)
    return accumulation_steps(training.global_batch_size, readers, rows_to_try(training, workers)[-1])


def tokens_of_worker(training: TrainingSpec, task: Task) -> int:
    """Return a worker's tokens of a row, which it may share with others; 0 where rows are no tokens."""
    return -(-row_tokens(task) // training.parallel.sequence)


def _readers(training: TrainingSpec, workers: int) -> int:
    """Return how many workers have rows of their own."""
    return max(1, workers // training.parallel.sequence)


def refusal(fit: Fit, found: Facts, of: Setting, row_tokens: int) -> str:
    """Say that no stage fits, how much is missing, and the ways out."""
    enough = next(_enough(fit, found, of, row_tokens), None)
    more = f"{_workers(enough)} with as much memory each" if enough else "workers with more memory"
    ways = [more]
    if of.checkpointing is not True and found.decoder is not None:
        ways.append("training.gradient_checkpointing: true")
    if of.on_gpu and of.offload == "none":
        ways.append("training.deepspeed.offload: cpu")
    if fit.rows > 1:
        ways.append("training.micro_batch_size: auto, or a smaller one")
    if row_tokens and found.decoder is not None:
        ways.append("a shorter task.sequence_length")
    ways.append("a smaller model (model.config)" if not found.frozen else "a smaller model")
    left_out = f" (stage 3 is left out: {of.undivided})" if of.undivided else ""
    return (
        f"training.deepspeed.zero_stage: auto: no stage fits{left_out}. Stage {fit.stage} lacks least: planned at "
        f"{fit.peak / GIB:.2f} GiB with micro-batches of {fit.rows}, on each of {_workers(fit.room.workers)}, which "
        f"may take {fit.usable / GIB:.2f} GiB (a tenth is left free); {fit.missing / GIB:.2f} GiB are missing. Ways "
        f"out: {'; '.join(ways)}; or name a stage, 0 to {of.stages[-1]}, to try it all the same"
    )


def _enough(fit: Fit, found: Facts, of: Setting, row_tokens: int) -> Iterator[int]:
    """Yield numbers of workers that would do, if each has as much."""
    workers = fit.room.workers
    while (workers := 2 * workers) <= MOST_WORKERS:
        if _judged(found, of, of.stages[-1], row_tokens, fit.rows, Room(workers, fit.room.memory_bytes)).fits:
            yield workers


def _workers(count: int) -> str:
    return f"{count} worker{'s' if count != 1 else ''}"


def row_tokens(task: Task) -> int:
    """Return the tokens of a row, 0 where rows are no tokens; a pair of answers is two rows."""
    length = getattr(task.options, "sequence_length", 0) if task.generates else 0
    pairs = getattr(task.options, "objective", "likelihood") != "likelihood"
    return int(length) * (2 if pairs else 1)


def growth(found: Facts, setting: Setting, tokens_of_row: int) -> Callable[[int], int] | None:
    """Return what passes over so many rows add to an engine that is ready, in bytes; None where that is not known."""
    if found.decoder is None or not tokens_of_row:
        return None

    def added(rows: int) -> int:
        need = memory.need(found, replace(setting, tokens=rows * tokens_of_row))
        return need.gradients + need.activations + need.buffers

    return added


def largest_rows(found: Facts, of: Setting, row_tokens: int, rows: int, memory_bytes: int) -> int:
    """Return the most rows of a micro-batch, up to `rows` of a step, with which the planned peak fits; 0: not one."""

    def fits(size: int) -> bool:
        setting = replace(of, tokens=size * row_tokens, micro_batches=-(-rows // size))
        return memory.need(found, setting).fits(memory_bytes)

    if fits(rows):  # looked at first: with one micro-batch no gradients wait, so that fewer rows may need more
        return rows
    low, high = 0, rows
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def with_rows(spec: JobSpec, rows: int) -> JobSpec:
    """Return a spec with so many rows of a micro-batch in place of `auto`."""
    assert spec.training is not None
    return spec.model_copy(update={"training": spec.training.model_copy(update={"micro_batch_size": rows})})


def with_stage(spec: JobSpec, stage: int) -> JobSpec:
    """Return a spec with the stage in place of `auto`."""
    assert spec.training is not None
    assert not isinstance(spec.training.deepspeed, str)
    deepspeed = spec.training.deepspeed.model_copy(update={"zero_stage": stage})
    return spec.model_copy(update={"training": spec.training.model_copy(update={"deepspeed": deepspeed})})


def is_open(spec: JobSpec) -> bool:
    """Say whether the spec leaves the stage to the plan."""
    training = spec.training
    return training is not None and not isinstance(training.deepspeed, str) and training.deepspeed.zero_stage == "auto"


def facts_of(spec: JobSpec, task: Task, parent: Path | None) -> Facts:
    """Count the model that a job trains, built without memory where it can be.

    Args:
        task: with what it has learned from the data.
        parent: the directory that the job starts from.

    Raises:
        UserError: the model cannot be built.
    """
    with start.described(spec):
        try:
            with torch.device("meta"), torch.random.fork_rng(devices=[]), loading.without_weights():
                return counted(spec, _model(spec, task, parent))
        except (NotImplementedError, RuntimeError):  # it looks at its own numbers
            with torch.random.fork_rng(devices=[]), loading.without_weights():
                return counted(spec, _model(spec, task, parent))


def counted(spec: JobSpec, model: torch.nn.Module) -> Facts:
    """Count a model as the spec has its base held; it may be on the meta device.

    Raises:
        UserError: the base is to be held in few bits, and nothing of it can be.
    """
    return facts.of(model, spec.model.lora.base if spec.model.lora else "whole")


def _model(spec: JobSpec, task: Task, parent: Path | None) -> torch.nn.Module:
    if parent is not None:
        model = task.load_model(parent, torch.float32, spec.model.config)
    else:
        assert spec.model.architecture is not None
        model = task.build(spec.model.architecture, spec.model.config)
    return model if spec.model.lora is None else lora.add_lora(model, spec.model.lora)
