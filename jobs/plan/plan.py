"""One job's plan: the model that its spec describes, on a number of devices. Estimates, from what is known here.

`make` plans a spec, for `tandem jobs plan` and `submit`; `of_model` a model that is there, in the first rank of a run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cluster.errors import UserError
from cluster.home import home
from cluster.precision import Precision, resolve, this_device
from jobs.data.batches import accumulation_steps, micro_batch_size, rows_of_rank
from jobs.plan import compute, devices, fit, memory, rates, remarks, serving, speed
from jobs.plan.facts import Facts
from jobs.plan.outlook import Outlook
from jobs.plan.rates import Rates
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
    users: int | None = None
    """How many are to be served at once, each with …"""
    tokens_per_second: float = 20.0
    """… so many …"""
    context: int | None = None
    """… behind so many of prompt and answer; None: the rows' length."""


@dataclass(frozen=True)
class Served:
    """What it takes to serve so many users."""

    demand: serving.Demand
    replicas: serving.Replicas
    by: str
    """What the rates are."""


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
    parts: speed.StepTime | None = None
    """A step's time by part, where rates were measured."""
    rates: str = ""
    """What the time goes by."""
    served: Served | None = None
    """What serving takes, where that was asked for and is known."""
    said: list[str] = field(default_factory=list)
    """What was assumed, and what is not counted."""

    @property
    def energy_kwh(self) -> float | None:
        """What the devices' boards take at most; None where that or the duration is not known."""
        if self.work.duration_s is None or self.device.watts is None:
            return None
        return self.work.duration_s / 3600 * self.world_size * self.device.watts / 1000

    @property
    def recommended(self) -> memory.Setting | None:
        """The lowest stage that fits."""
        return memory.recommended(self.needs, self.device.memory_bytes)


@dataclass(frozen=True)
class Group:
    """The workers that a plan is made for."""

    device: devices.Device
    world_size: int
    precision: Precision
    micro_batch: int
    """Rows."""
    process_bytes: int | None = None
    """Of a worker with the smallest model; None: not known."""
    rates: Rates | None = None
    """What was measured of such workers; None: nothing."""


def make(spec: JobSpec, base: Path, asked: Asked, where: Where, without_data: bool = False) -> Plan:
    """Plan a job that trains. Imports torch and transformers; starts nothing.

    Args:
        base: where relative paths start.
        without_data: refuse a model whose size depends on data, instead of reading some.

    Raises:
        UserError: the job trains nothing, its model cannot be built here, or a device is unknown.
    """
    from jobs.plan import skeleton

    training = _training(spec, where)
    device, world = placed(spec, asked, where)
    model, task, said = skeleton.build(spec, base, without_data)
    precision = precision_of(training, device)
    readers = max(1, world // training.parallel.sequence)
    micro = micro_batch_size(training.micro_batch_size, training.global_batch_size, readers)
    known, process = measured_here(spec, device, precision, world)
    group, found = Group(device, world, precision, micro, process, known), fit.counted(spec, model)
    made = of_model(spec, found, task, group, asked.mfu, said)
    return made if asked.users is None else with_serving(made, group, asked)


def with_serving(made: Plan, group: Group, asked: Asked) -> Plan:
    """Return a plan with what it takes to serve the model, each replica on one such device. Pure."""
    assert asked.users is not None
    device, known = group.device, group.rates
    width = 2 if group.precision == "bf16" else 4
    demand = serving.Demand(asked.users, asked.tokens_per_second, asked.context or made.row_tokens)
    if device.bandwidth is not None and device.flops is not None:
        reached = asked.mfu * device.flops[group.precision]
        server = serving.Server(device.memory_bytes, serving.READ * device.bandwidth, reached, width)
        by = f"{serving.READ:.0%} of the bandwidth and {asked.mfu:.0%} of the peak FLOP/s, both assumed"
    elif known is not None and made.facts.decoder is not None:
        reached = rates.at(known.products, made.facts.decoder.hidden)
        server = serving.Server(device.memory_bytes - known.process_bytes, known.bandwidth, reached, width)
        by = known.said
    else:
        unknown = "no replicas: the bandwidth of this machine is not known; measure it: tandem jobs plan --calibrate"
        return replace(made, said=[*made.said, unknown])
    found = serving.replicas(made.facts, server, demand) if demand.context else None
    if found is None:
        return replace(made, said=[*made.said, f"no replicas: {made.facts.kind} writes no tokens one by one"])
    return replace(made, served=Served(demand, found, by))


def measured(precision: Precision, workers: int, cpus: float, on_gpu: bool) -> Rates | None:
    """Return what was measured of this machine's workers, of which there are so many at once; None: nothing."""
    kind = rates.kind_of_gpu() if on_gpu else rates.kind_of_cpu()
    return rates.choose(rates.kept(home()), kind, precision, max(1, int(cpus)), workers)


def measured_here(
    spec: JobSpec, device: devices.Device, precision: Precision, world: int
) -> tuple[Rates | None, int | None]:
    """Return what was measured of such workers, and the bytes of one with the smallest model; None: not known."""
    known = measured(precision, world, spec.resources.cpus_per_worker, device.on_gpu) if device.here else None
    return known, known.process_bytes + known.engine_bytes if known and not device.on_gpu else None


def of_model(
    spec: JobSpec,
    found: Facts,
    task: Task,
    group: Group,
    mfu: float = compute.MFU,
    said: Sequence[str] = (),
) -> Plan:
    """Plan the training of a model that is known already. Pure.

    Args:
        said: what was assumed of the model.
    """
    training, device, world, precision = spec.training, group.device, group.world_size, group.precision
    assert training is not None
    readers = max(1, world // training.parallel.sequence)
    accumulation = accumulation_steps(training.global_batch_size, readers, group.micro_batch)
    row_tokens = fit.row_tokens(task)
    chosen = _chosen(spec, group, row_tokens, accumulation)
    flops = compute.flops_per_token(found, row_tokens, training.gradient_checkpointing is True) if row_tokens else None
    parts = speed.step(found, chosen, row_tokens, group.rates) if group.rates and chosen.stage >= 0 else None
    step_s, by = _step_s(training, group, row_tokens, flops, parts, mfu)
    return Plan(
        name=spec.name,
        facts=found,
        device=device,
        world_size=world,
        precision=precision,
        micro_batch=group.micro_batch,
        accumulation=accumulation,
        rows_per_step=training.global_batch_size,
        row_tokens=row_tokens,
        chosen=chosen,
        needs=[(each, memory.need(found, each)) for each in memory.settings(chosen)],
        flops_per_token=flops,
        mfu=mfu,
        work=compute.Work(training.global_batch_size * row_tokens, training.steps, step_s),
        parts=parts,
        rates=by,
        optimal_tokens=compute.optimal_tokens(found) if found.decoder and spec.model.source is None else None,
        said=[*said, *remarks.of(spec, found, chosen), *_said_of_time(found, group, parts)],
    )


def _said_of_time(found: Facts, group: Group, parts: speed.StepTime | None) -> list[str]:
    return remarks.of_time(group.rates, group.device, group.world_size, parts) if found.decoder else []


def outlook(made: Plan, time_ms: int, saves: bool = True) -> Outlook:
    """Return in short what the spec's own setting should take. Pure.

    Args:
        time_ms: when the plan was made.
        saves: whether checkpoints are written before the run's end.
    """
    need = dict(made.needs).get(made.chosen)
    unknown = need is None or made.facts.decoder is None
    advice = ""
    if need is not None and not need.fits(made.device.memory_bytes):
        best = made.recommended
        advice = f"ZeRO {best.stage} would fit" if best else "no ZeRO stage would fit (tandem jobs plan says more)"
    return Outlook(
        workers=made.world_size,
        layout=f"{_stage(made.chosen)}, {made.precision}",
        room_bytes=made.device.memory_bytes,
        peak_bytes=None if need is None or unknown else need.peak if saves else need.unsaved_peak,
        step_s=made.work.step_s,
        duration_s=made.work.duration_s,
        rates=made.rates,
        advice=advice,
        said=tuple(_unknown(made) if unknown else made.said),
        time_ms=time_ms,
    )


def _stage(setting: memory.Setting) -> str:
    if setting.stage < 0:
        return "a DeepSpeed JSON"
    return f"ZeRO {setting.named}"


def _unknown(made: Plan) -> list[str]:
    """Say why there is no figure of memory."""
    if made.chosen.stage < 0:
        return ["a DeepSpeed JSON of your own is not looked at", *made.said]
    return [f"what the layers of {made.facts.kind} keep is not", *made.said]


def _training(spec: JobSpec, where: Where) -> TrainingSpec:
    if spec.training is None or spec.phase not in ("pretrain", "finetune", "sweep"):
        raise UserError(
            f"{where('phase')}: phase {spec.phase} trains nothing; a plan is for pretrain, finetune and sweep"
        )
    return spec.training


def placed(spec: JobSpec, asked: Asked, where: Where) -> tuple[devices.Device, int]:
    """Return what each worker computes with, and how many workers there are.

    Raises:
        UserError: a device is unknown, or the spec wants GPUs and nobody says which.
    """
    wanted = spec.resources
    world = asked.devices or wanted.fewest
    if asked.device is not None:
        return devices.named(asked.device), world
    if wanted.gpus_per_worker and (here := devices.this_gpu()) is not None:
        return here, world
    if wanted.gpus_per_worker:
        raise UserError(
            f"{where('resources.gpus_per_worker')}: `resources.gpus_per_worker` is {wanted.gpus_per_worker:g}, and a "
            f"plan needs to know which GPU: add --device, one of {', '.join(devices.KNOWN)}"
        )
    return devices.this_machine(world), world


def precision_of(training: TrainingSpec, device: devices.Device) -> Precision:
    """Return what a device computes in; all known GPUs multiply bf16."""
    if not device.on_gpu:
        return resolve(training.precision, [this_device()])
    return "fp32" if training.precision == "fp32" else "bf16"


def _chosen(spec: JobSpec, group: Group, row_tokens: int, accumulation: int) -> memory.Setting:
    training = spec.training
    assert training is not None
    given, stage, offloads, in_files = training.deepspeed, -1, False, False
    if not isinstance(given, str) and given.zero_stage != "auto":
        stage, offloads = given.zero_stage, given.offload != "none"
        in_files = given.offload_parameters == "nvme"
    return memory.Setting(
        stage=stage,
        offload="cpu" if offloads and stage > 0 else "none",  # to NVMe: the host needs no more than that
        precision=group.precision,
        world_size=group.world_size,
        on_gpu=group.device.on_gpu,
        tokens=-(-group.micro_batch * row_tokens // training.parallel.sequence),
        checkpointing=training.gradient_checkpointing,
        optimizer=training.optimizer,
        micro_batches=accumulation,
        process_bytes=group.process_bytes or 0,
        in_files=in_files,
        undivided=fit.undivided(spec, group.device.on_gpu),
    )


def _step_s(
    training: TrainingSpec,
    group: Group,
    row_tokens: int,
    flops: float | None,
    parts: speed.StepTime | None,
    mfu: float,
) -> tuple[float | None, str]:
    """Return the seconds of a step, and what they go by: measured rates before an assumed share of the peak."""
    if parts is not None and group.rates is not None:
        return parts.all_s, group.rates.said
    peak = (group.device.flops or {}).get(group.precision)
    if flops is None or peak is None:
        return None, ""
    sharing = training.parallel.sequence
    rows = rows_of_rank(training.global_batch_size, max(1, group.world_size // sharing))
    tokens_of_a_rank = rows * row_tokens // sharing
    return compute.step_s(flops, tokens_of_a_rank, peak, mfu), f"an assumed {mfu:.0%} of the peak FLOP/s"
