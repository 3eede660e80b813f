"""What a plan says of itself: what its figures do not hold, or hold only so. Pure."""

from __future__ import annotations

from jobs.plan.devices import Device
from jobs.plan.facts import Facts
from jobs.plan.rates import Rates
from jobs.plan.setting import Setting
from jobs.plan.speed import StepTime
from jobs.spec import JobSpec


def of(spec: JobSpec, found: Facts, chosen: Setting) -> list[str]:
    """Return sentences on what of this spec the figures do not hold, or hold only so. Pure."""
    training, said, world = spec.training, [], chosen.world_size
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
    if chosen.undivided:
        said.append(f"ZeRO stage 3 is left out: {chosen.undivided}")
    if found.held:
        said.append(
            f"{found.held:,} frozen elements are held in few bits; the time to make weights of them is not counted"
        )
    if training.optimizer == "muon":
        said.append("of Muon, what a matrix takes while it is made orthogonal, and how long that takes, is not counted")
    if found.decoder is None:
        said.append(f"activations, FLOPs and time are not counted: {found.kind} is no causal transformer")
        return said
    if training.compile:
        said.append("the model is counted as it is written: compiled, it takes other time and other activations")
    if training.gradient_checkpointing == "selective" and spec.model.lora is not None:
        said.append("what selective checkpointing keeps of adapters' own products is not counted")
    if found.decoder.mixture:
        said.append("experts are counted as if each token saw all: FLOPs, time and activations are upper bounds")
    if not (found.decoder.rms_norm and found.decoder.gated):
        said.append("activations are a lower bound: dropout keeps up to as much again")
    if spec.task.options.get("objective", "likelihood") != "likelihood":
        said.append("a pair of answers is counted as two rows of full length")
    return said


def of_time(known: Rates | None, device: Device, world: int, parts: StepTime | None) -> list[str]:
    """Say what of the time was measured elsewhere than it is used, or why there is none."""
    if known is None and device.flops is None:
        return ["no time: the rate of this machine is not known; measure it once: tandem jobs plan --calibrate"]
    if parts is None or known is None:
        return []
    said = list[str]()
    if known.workers != world:
        said.append(f"rates are those of {known.workers} at once, not of {world} workers")
    if world > 2:
        said.append("communication is reckoned from two ranks on this machine; a network between nodes is not measured")
    return said
