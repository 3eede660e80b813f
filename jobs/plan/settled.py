"""What `auto` comes to in `tandem jobs plan`: a ZeRO stage and a micro-batch, on the devices that are asked about."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from jobs.data.batches import rows_of_rank
from jobs.plan import fit, plan, skeleton
from jobs.plan.devices import Device
from jobs.plan.facts import Facts
from jobs.plan.fit import Room
from jobs.plan.memory import Setting
from jobs.plan.plan import Asked, Plan, Where
from jobs.spec import JobSpec


def planned(spec: JobSpec, base: Path, asked: Asked, where: Where, without_data: bool = False) -> Plan:
    """Plan a job as `plan.make` does, with what each `auto` comes to; the plan says so first.

    Raises:
        UserError: as `plan.make`.
    """
    certain, said = settled(spec, base, asked, where, without_data)
    made = plan.make(certain, base, asked, where, without_data)
    return replace(made, said=[*said, *made.said])


def settled(
    spec: JobSpec, base: Path, asked: Asked, where: Where, without_data: bool = False
) -> tuple[JobSpec, list[str]]:
    """Return the spec with what the plan comes to in place of each `auto`, and what is to be said of that.

    Args:
        base: where relative paths start.
        without_data: refuse a model whose size depends on data, instead of reading some.

    Raises:
        UserError: the model cannot be built here, or a device is unknown.
    """
    training = spec.training
    if training is None or not (fit.is_open(spec) or training.micro_batch_size == "auto"):
        return spec, []
    device, world = plan.placed(spec, asked, where)
    room, of = Room(world, device.memory_bytes), _setting(spec, device, world)
    model, task, _ = skeleton.build(spec, base, without_data)
    found, tokens, said = fit.counted(spec, model), fit.tokens_of_worker(training, task), list[str]()
    if fit.is_open(spec):
        best = fit.lowest_stage(found, of, tokens, fit.rows_to_try(training, world), [room])
        said.append(f"zero_stage auto: {best.sentence()}" if best.fits else fit.refusal(best, found, of, tokens))
        spec, of = fit.with_stage(spec, best.stage), replace(of, stage=best.stage)
    if training.micro_batch_size == "auto" and of.stage >= 0:
        spec, sentence = _rows(spec, found, of, tokens, room)
        said.append(sentence)
    return spec, said


def _setting(spec: JobSpec, device: Device, world: int) -> Setting:
    """Return how the spec has it trained; stage -1: it does not say."""
    training = spec.training
    assert training is not None
    given, precision = training.deepspeed, plan.precision_of(training, device)
    stage, offloads = (-1, False) if isinstance(given, str) else (given.zero_stage, given.offload != "none")
    return Setting(
        stage=0 if stage == "auto" else stage,
        offload="cpu" if offloads else "none",
        precision=precision,
        world_size=world,
        on_gpu=device.on_gpu,
        checkpointing=training.gradient_checkpointing,
        optimizer=training.optimizer,
        micro_batches=fit.micro_batches(training, world),
        process_bytes=plan.measured_here(spec, device, precision, world)[1] or 0,
        undivided=fit.undivided(spec, device.on_gpu),
    )


def _rows(spec: JobSpec, found: Facts, of: Setting, tokens: int, room: Room) -> tuple[JobSpec, str]:
    """Return the spec with the rows that should fit, and a sentence."""
    assert spec.training is not None
    most = rows_of_rank(spec.training.global_batch_size, room.workers)
    if found.decoder is None or not tokens:
        return (
            spec,
            f"micro_batch_size auto: found by trial when the job begins; what {found.kind} keeps is not planned",
        )
    rows = fit.largest_rows(found, of, tokens, most, room.memory_bytes)
    sentence = f"micro_batch_size auto: {rows} of a worker's {most} rows should fit; the job tries when it begins"
    return fit.with_rows(spec, max(1, rows)), sentence
