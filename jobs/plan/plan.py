"""One job's plan: the model that its spec describes, on a number of devices. Estimates, from what is known here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cluster.errors import UserError
from cluster.precision import Precision, resolve, this_device
from jobs.data.batches import accumulation_steps, micro_batch_size
from jobs.plan import compute, devices, facts, memory, skeleton
from jobs.plan.facts import Facts
from jobs.spec import JobSpec, TrainingSpec
from jobs.tasks import Task

Where = Callable[[str], str]
"""Dotted path of a key → its file and line."""


@dataclass(frozen=True)
class Asked:
    """What a plan is asked for besides the spec; None: as the spec and this machine have it."""

    device: str | None = None
    devices: int | None = None
    mfu: float = compute.MFU


@dataclass(frozen=True)
class Plan:
    """What a job would need."""

    name: str
    facts: Facts
    device: devices.Device
    world_size: int
    precision: Precision
    micro_batch: int
    accumulation: int
    rows_per_step: int
    row_tokens: int
    """Tokens of a row; 0 where rows are no tokens."""
    chosen: memory.Setting
    """What the spec says."""
    needs: list[tuple[memory.Setting, memory.Need]]
    flops_per_token: float | None
    mfu: float
    work: compute.Work
    optimal_tokens: int | None
    """None where nothing is known of that: no causal transformer, or one that begins with learned weights."""
    said: list[str] = field(default_factory=list)
    """What was assumed, and what is not counted."""

    @property
    def recommended(self) -> memory.Setting | None:
        """The lowest stage that fits."""
        return memory.recommended(self.needs, self.device.memory_bytes)


def make(spec: JobSpec, base: Path, asked: Asked, where: Where) -> Plan:
    """Plan a job that trains. Imports torch and transformers; starts nothing.

    Args:
        base: where relative paths start.

    Raises:
        UserError: the job trains nothing, its model cannot be built here, or a device is unknown.
    """
    training = _training(spec, where)
    device, world = _placed(spec, asked, where)
    model, task, said = skeleton.build(spec, base)
    found = facts.of(model)
    precision = resolve(training.precision, [this_device()]) if not device.on_gpu else _on_gpu(training)
    parts = training.parallel.sequence
    readers = max(1, world // parts)
    micro = micro_batch_size(training.micro_batch_size, training.global_batch_size, readers)
    accumulation = accumulation_steps(training.global_batch_size, readers, micro)
    row_tokens = _row_tokens(task)
    chosen = _chosen(training, precision, world, device, -(-micro * row_tokens // parts))
    flops = compute.flops_per_token(found, row_tokens, training.gradient_checkpointing is True) if row_tokens else None
    return Plan(
        name=spec.name,
        facts=found,
        device=device,
        world_size=world,
        precision=precision,
        micro_batch=micro,
        accumulation=accumulation,
        rows_per_step=training.global_batch_size,
        row_tokens=row_tokens,
        chosen=chosen,
        needs=[(each, memory.need(found, each)) for each in memory.settings(chosen)],
        flops_per_token=flops,
        mfu=asked.mfu,
        work=_work(training, world, row_tokens, flops, device, precision, asked.mfu),
        optimal_tokens=compute.optimal_tokens(found) if found.decoder and spec.model.source is None else None,
        said=[*said, *remarks(spec, found, world, device)],
    )


def remarks(spec: JobSpec, found: Facts, world: int, device: devices.Device) -> list[str]:
    """Return sentences on what of this spec the figures do not hold, or hold only so. Pure."""
    training, said = spec.training, []
    assert training is not None
    if spec.phase == "sweep":
        said.append("this is one trial of the sweep, with the spec's own values")
    if isinstance(training.deepspeed, str):
        said.append(f"{training.deepspeed} was not looked at: buckets are DeepSpeed's own, and no stage is marked")
    parts = training.parallel.sequence
    if training.global_batch_size * parts < world:
        said.append(
            f"training.global_batch_size is {training.global_batch_size}: "
            f"{world - parts * training.global_batch_size} of {world} workers would have no rows"
        )
    if parts > 1:
        said.append(f"what attention takes while {parts} workers exchange their parts of a row is not counted")
    if found.decoder is None:
        said.append(f"activations, FLOPs and time are not counted: {found.kind} is no causal transformer")
        return said
    if found.decoder.mixture:
        said.append("experts are counted as if each token saw all: FLOPs, time and activations are upper bounds")
    if not (found.decoder.rms_norm and found.decoder.gated):
        said.append("activations are a lower bound: dropout and a GELU in steps (gpt2) keep up to as much again")
    if spec.task.options.get("objective", "likelihood") != "likelihood":
        said.append("a pair of answers is counted as two rows of full length")
    if device.flops is None:
        said.append("no time: the rate of this machine is not known; --device names one whose rate is")
    return said


def _training(spec: JobSpec, where: Where) -> TrainingSpec:
    if spec.training is None or spec.phase not in ("pretrain", "finetune", "sweep"):
        raise UserError(
            f"{where('phase')}: phase {spec.phase} trains nothing; a plan is for pretrain, finetune and sweep"
        )
    return spec.training


def _placed(spec: JobSpec, asked: Asked, where: Where) -> tuple[devices.Device, int]:
    """Return what each worker computes with, and how many workers there are."""
    wanted = spec.resources
    world = asked.devices or wanted.fewest
    if asked.device is not None:
        return devices.named(asked.device), world
    if wanted.gpus_per_worker:
        raise UserError(
            f"{where('resources.gpus_per_worker')}: `resources.gpus_per_worker` is {wanted.gpus_per_worker:g}, and a "
            f"plan needs to know which GPU: add --device, one of {', '.join(devices.KNOWN)}"
        )
    return devices.this_machine(world), world


def _on_gpu(training: TrainingSpec) -> Precision:
    """Return what a known GPU computes in: all of them multiply bf16."""
    return "fp32" if training.precision == "fp32" else "bf16"


def _row_tokens(task: Task) -> int:
    length = getattr(task.options, "sequence_length", 0) if task.generates else 0
    pairs = getattr(task.options, "objective", "likelihood") != "likelihood"
    return int(length) * (2 if pairs else 1)


def _chosen(
    training: TrainingSpec, precision: Precision, world: int, device: devices.Device, tokens: int
) -> memory.Setting:
    given, stage, offloads = training.deepspeed, -1, False
    if not isinstance(given, str) and given.zero_stage != "auto":
        stage, offloads = given.zero_stage, given.offload != "none"
    return memory.Setting(
        stage=stage,
        offload="cpu" if offloads and device.on_gpu and stage else "none",  # to NVMe: the host needs no more than that
        precision=precision,
        world_size=world,
        on_gpu=device.on_gpu,
        tokens=tokens,
        checkpointing=training.gradient_checkpointing is True,
    )


def _work(
    training: TrainingSpec,
    world: int,
    row_tokens: int,
    flops: float | None,
    device: devices.Device,
    precision: Precision,
    mfu: float,
) -> compute.Work:
    parts = training.parallel.sequence
    tokens_of_a_rank = -(-training.global_batch_size // max(1, world // parts)) * row_tokens // parts
    step = None
    if flops is not None and device.flops is not None:
        step = compute.step_s(flops, tokens_of_a_rank, device.flops[precision], mfu)
    return compute.Work(training.global_batch_size * row_tokens, training.steps, step)
