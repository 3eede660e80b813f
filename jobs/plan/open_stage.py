"""`zero_stage: auto` in `tandem jobs plan`: what a job would come to on the devices that are asked about."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cluster.precision import resolve, this_device
from jobs.plan import devices, facts, fit, skeleton
from jobs.plan.fit import Room
from jobs.plan.memory import Setting
from jobs.plan.plan import Asked, Plan
from jobs.spec import JobSpec


def settled(spec: JobSpec, base: Path, asked: Asked) -> tuple[JobSpec, list[str]]:
    """Return the spec with a stage in place of `auto`, and what is to be said of that.

    Args:
        base: where relative paths start.

    Raises:
        UserError: the model cannot be built here, or a device is unknown.
    """
    training, wanted = spec.training, spec.resources
    if not fit.is_open(spec) or training is None:
        return spec, []
    if asked.device is None and wanted.gpus_per_worker:
        return fit.with_stage(spec, 0), []  # the plan refuses it: nobody says which GPU
    world = asked.devices or wanted.fewest
    device = devices.named(asked.device) if asked.device is not None else devices.this_machine(world)
    precision = training.precision if device.on_gpu else resolve(training.precision, [this_device()])
    of = Setting(
        stage=0,
        offload=training.deepspeed.offload,  # type: ignore[union-attr]
        precision="fp32" if precision == "fp32" else "bf16",
        world_size=world,
        on_gpu=device.on_gpu,
        checkpointing=training.gradient_checkpointing,
    )
    model, task, _ = skeleton.build(spec, base)
    found, tokens = facts.of(model), fit.row_tokens(task)
    best = fit.lowest_stage(found, of, tokens, fit.rows_to_try(training, world), [Room(world, device.memory_bytes)])
    said = f"zero_stage auto: {best.sentence()}" if best.fits else fit.refusal(best, found, of, tokens)
    return fit.with_stage(spec, best.stage), [said]


def told(plan: Plan, said: list[str]) -> Plan:
    """Return a plan that says so first."""
    return replace(plan, said=[*said, *plan.said])
