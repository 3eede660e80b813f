"""The memory of one rank by part, at each ZeRO stage, as this code and DeepSpeed 0.19 lay it out. Pure; estimates.

T elements are trained, F frozen, over W ranks. Bytes (jobs/worker/zero.py, jobs/worker/zero_layouts.py):

    stage     weights        gradients  masters  moments
    0         4 (T+F)        4 T        –        8 T      bf16 is autocast, which keeps copies of 2 (T+F)
    1, bf16   2 (T+F)        6 T        4 T/W    8 T/W    BF16_Optimizer: whole fp32 sums beside bf16 gradients
    1, fp32   4 (T+F)        4 T        –        8 T/W
    2, bf16   2 (T+F)        4 T/W      4 T/W    8 T/W
    2, fp32   4 (T+F)        4 T/W      –        8 T/W
    3, bf16   2 (T+F)/W      4 T/W      4 T/W    8 T/W
    3, fp32   4 (T+F)/W      4 T/W      –        8 T/W

The dash: the weights are what the optimizer changes; where it is on the host of a GPU (offload at stages 1 and 2) there
are masters, 4 T/W. So there are where weights are on NVMe, which are no part of this then, but for small ones.
Frozen weights that are held in few bits (jobs/worker/held.py) are no part of F: their bytes come to the weights, and
the largest of them is made whole for as long as it multiplies. Of matrices that learn by Muon (jobs/worker/muon.py)
there is one moment, 4 of the 8 bytes. tests/integration/test_jobs_plan_engine.py holds this table against engines.

The account is that of ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054), whose example has 2 + 2 + 12 bytes a parameter;
here gradients are summed in fp32. What comes and goes beside that is in jobs/plan/passes.py.
"""

from __future__ import annotations

from dataclasses import replace

from jobs.plan import passes
from jobs.plan.facts import Decoder, Facts
from jobs.plan.setting import FREE, MIB, Need, Setting

__all__ = ["ENGINE", "FREE", "MIB", "Need", "Setting", "activations", "need", "recommended", "settings"]

PROCESS = 480 * MIB
"""A worker that has imported what it needs (`imports` of benchmarks/model_memory.py), where none was measured."""


ENGINE = 40 * MIB
"""What it takes more with the smallest engine, where that has not been measured."""


def need(facts: Facts, setting: Setting) -> Need:
    """Return what one rank needs."""
    state, moments = _state(facts, setting), passes.moments(facts, setting)
    found = replace(
        state,
        activations=0 if facts.decoder is None else activations(facts.decoder, setting),
        buffers=passes.buffers(facts, setting),
        step=passes.step(facts, setting),
        most=passes.most(moments, setting.on_gpu, passes.HOLES[setting.stage], passes.resting(facts, setting)),
    )
    return _placed(found, facts, setting)


def settings(of: Setting) -> list[Setting]:
    """Return the choices of stage and offload; where the memory is the host's own, offload moves nothing."""
    plain = [replace(of, stage=stage, offload="none", in_files=False) for stage in of.stages]
    offloaded = [replace(each, offload="cpu") for each in plain if of.on_gpu and each.stage]
    as_asked = of.in_files or (of.stage > 0 and of.offload != "none" and not of.on_gpu)
    return plain + offloaded + [of] * as_asked


def recommended(needs: list[tuple[Setting, Need]], memory_bytes: int) -> Setting | None:
    """Return the lowest stage that fits, without files and offload if there is one; None: nothing fits."""
    fitting = [setting for setting, found in needs if found.fits(memory_bytes)]
    return min(fitting, key=lambda each: (each.in_files, each.offload != "none", each.stage), default=None)


def activations(decoder: Decoder, setting: Setting) -> int:
    """Return what a micro-batch keeps for the backward pass, with logits and their gradient."""
    return sum(size * count for size, count in [*passes.kept(decoder, setting), *passes.logits(decoder, setting)])


def _state(facts: Facts, setting: Setting) -> Need:
    trained, mine, fewer = facts.trainable, setting.share(facts.trainable), _of_one_moment(facts, setting)
    whole = setting.stored * facts.numbers + facts.held_bytes
    if setting.stage == 0:
        return Need(weights=whole, gradients=4 * trained, moments=8 * trained - 4 * fewer)
    moments = 8 * mine - 4 * setting.share(fewer)
    masters = 4 * mine if setting.masters_apart else 0
    if setting.stage == 1:
        summed = 6 if setting.precision == "bf16" and setting.offload == "none" else 4
        return Need(weights=whole, gradients=summed * trained, masters=masters, moments=moments)
    if setting.stage == 2:
        return Need(weights=whole, gradients=4 * mine, masters=masters, moments=moments)
    parted = setting.stored * setting.share(facts.persistent if setting.in_files else facts.parameters)
    return Need(weights=parted, gradients=4 * mine, masters=masters, moments=moments)


def _of_one_moment(facts: Facts, setting: Setting) -> int:
    """Return how many elements have their momentum alone, where AdamW's have two moments."""
    return facts.matrices if setting.optimizer == "muon" else 0


def _placed(found: Need, facts: Facts, setting: Setting) -> Need:
    """Tell the host's part from the device's, where these are two."""
    process = setting.process_bytes or PROCESS + ENGINE
    saving = 12 * setting.share(facts.trainable) - 4 * setting.share(_of_one_moment(facts, setting))
    if not setting.on_gpu:
        return replace(found, process=process, saving=saving)
    if setting.offload == "none":
        return replace(found, host=process + saving)
    mine = 4 * setting.share(facts.trainable)
    host = process + saving + found.masters + found.moments + mine
    if setting.stage == 1:  # its sums are whole on the device, and this rank's part of them on the host
        return replace(found, masters=0, moments=0, step=0, host=host)
    if setting.stage == 2:
        return replace(found, gradients=0, masters=0, moments=0, step=0, host=host)
    # stage 3 keeps the gradients of each group twice there: as they come, and as the optimizer takes them
    return replace(found, weights=0, gradients=0, masters=0, moments=0, step=0, host=host + found.weights + mine)
