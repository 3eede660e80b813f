"""What `auto` comes to in `tandem jobs plan`: a ZeRO stage and a micro-batch, on the devices that are asked about."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cluster.precision import resolve, this_device
from jobs.data.batches import rows_of_rank
from jobs.plan import devices, facts, fit, skeleton
from jobs.plan.facts import Facts
from jobs.plan.fit import Room
from jobs.plan.memory import Setting
from jobs.plan.plan import Asked, Plan
from jobs.spec import JobSpec, TrainingSpec


def settled(spec: JobSpec, base: Path, asked: Asked) -> tuple[JobSpec, list[str]]:
    """Return the spec with what the plan comes to in place of each `auto`, and what is to be said of that.

    Args:
        base: where relative paths start.

    Raises:
        UserError: the model cannot be built here, or a device is unknown.
    """
    training = spec.training
    if training is None or not (fit.is_open(spec) or training.micro_batch_size == "auto"):
        return spec, []
    if asked.device is None and spec.resources.gpus_per_worker:  # the plan refuses that: nobody says which GPU
        return (fit.with_stage(spec, 0) if fit.is_open(spec) else spec), []
    world = asked.devices or spec.resources.fewest
    device = devices.named(asked.device) if asked.device is not None else devices.this_machine(world)
    room, of = Room(world, device.memory_bytes), _setting(training, world, device.on_gpu)
    model, task, _ = skeleton.build(spec, base)
    found, tokens, said = facts.of(model), fit.row_tokens(task), list[str]()
    if fit.is_open(spec):
        best = fit.lowest_stage(found, of, tokens, fit.rows_to_try(training, world), [room])
        said.append(f"zero_stage auto: {best.sentence()}" if best.fits else fit.refusal(best, found, of, tokens))
        spec, of = fit.with_stage(spec, best.stage), replace(of, stage=best.stage)
    if training.micro_batch_size == "auto" and of.stage >= 0:
        spec, sentence = _rows(spec, found, of, tokens, room)
        said.append(sentence)
    return spec, said


def _setting(training: TrainingSpec, world: int, on_gpu: bool) -> Setting:
    """Return how the spec has it trained; stage -1: it does not say."""
    given = training.deepspeed
    stage, offloads = (-1, False) if isinstance(given, str) else (given.zero_stage, given.offload != "none")
    precision = training.precision if on_gpu else resolve(training.precision, [this_device()])
    return Setting(
        stage=0 if stage == "auto" else stage,
        offload="cpu" if offloads else "none",
        precision="fp32" if precision == "fp32" else "bf16",
        world_size=world,
        on_gpu=on_gpu,
        checkpointing=training.gradient_checkpointing is True,
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


def told(plan: Plan, said: list[str]) -> Plan:
    """Return a plan that says so first."""
    return replace(plan, said=[*said, *plan.said])
