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
are masters, 4 T/W. tests/integration/test_jobs_plan_engine.py holds this table against engines.

The account is that of ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054), whose example has 2 + 2 + 12 bytes a parameter;
here gradients are summed in fp32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from cluster.precision import Precision
from jobs.plan.facts import Decoder, Facts
from jobs.worker.zero import SMALL_BUCKETS

MIB = 1 << 20
PROCESS = 340 * MIB
"""A worker that has imported what it needs (`imports` of benchmarks/model_memory.py)."""
FREE = 0.1
"""This share of the memory is left to the system; of a GPU's, to CUDA, NCCL and fragments."""
BUCKET = 500_000_000
"""DeepSpeed's own `reduce_bucket_size`, in elements."""
LIVE = 1_000_000_000
"""DeepSpeed's own `stage3_max_live_parameters`, and the size of the groups in which stage 3 steps, in elements."""
CHUNK = {True: 1 << 28, False: 1 << 20}
"""Bytes of fp32 logits at a time, on a GPU and on a CPU (jobs/tasks/cross_entropy.py)."""

Offload = Literal["none", "cpu"]


@dataclass(frozen=True)
class Setting:
    """How a model is trained."""

    stage: int
    offload: Offload
    precision: Precision
    world_size: int
    on_gpu: bool
    tokens: int = 0
    """Of a micro-batch."""
    checkpointing: bool = False
    """Activations are computed again in the backward pass."""


@dataclass(frozen=True)
class Need:
    """Bytes of one rank on the device that computes, and on its host."""

    weights: int = 0
    gradients: int = 0
    masters: int = 0
    """fp32 weights that the optimizer changes, where these are not the weights themselves."""
    moments: int = 0
    activations: int = 0
    """What the forward pass keeps for the backward pass, with logits and their gradient."""
    buffers: int = 0
    """What passes are computed through: buckets of gradients, gathered parameters, autocast's copies."""
    step: int = 0
    """What the optimizer's step takes besides, when activations and buffers are gone."""
    process: int = 0
    """The process itself."""
    saving: int = 0
    """The copy that a checkpoint is written from, beside the next forward pass."""
    host: int = 0
    """All of it that lies in the host's memory, where the device has its own."""

    @property
    def state(self) -> int:
        """What is there all the time."""
        return self.weights + self.gradients + self.masters + self.moments + self.process

    @property
    def peak(self) -> int:
        """The most at once on the device."""
        return self.state + max(self.activations + self.buffers + self.saving, self.step)

    def fits(self, memory_bytes: int) -> bool:
        """Say whether it fits into a device's memory, of which a tenth is left free."""
        return self.peak <= memory_bytes * (1 - FREE)


def need(facts: Facts, setting: Setting) -> Need:
    """Return what one rank needs."""
    found = replace(_state(facts, setting), buffers=_buffers(facts, setting), step=_step(facts, setting))
    if facts.decoder is not None:
        found = replace(found, activations=activations(facts.decoder, setting))
    return _placed(found, facts, setting)


def settings(of: Setting) -> list[Setting]:
    """Return the choices of stage and offload; where the memory is the host's own, offload moves nothing."""
    plain = [replace(of, stage=stage, offload="none") for stage in (0, 1, 2, 3)]
    return plain + [replace(each, offload="cpu") for each in plain if of.on_gpu and each.stage]


def recommended(needs: list[tuple[Setting, Need]], memory_bytes: int) -> Setting | None:
    """Return the lowest stage that fits, without offload if there is one; None: nothing fits."""
    fitting = [setting for setting, found in needs if found.fits(memory_bytes)]
    return min(fitting, key=lambda setting: (setting.offload != "none", setting.stage), default=None)


def activations(decoder: Decoder, setting: Setting) -> int:
    """Return what a micro-batch keeps for the backward pass.

    The account of Korthikanti et al. 2022 (arXiv:2205.05198, equation 2) without attention scores, which fused kernels
    do not keep, and dropout masks; for any width of queries, keys and MLP, with transformers' RMSNorm, whose input is
    kept in fp32 and whose normalised value once more.
    """
    width = _width(setting)
    attention = decoder.hidden + 2 * decoder.queries + 2 * decoder.keys
    mlp = decoder.hidden + (4 if decoder.gated else 2) * decoder.intermediate
    norms = 2 * decoder.hidden * ((4 + width) if decoder.rms_norm else width)
    layer = width * (attention + mlp) + norms
    kept = decoder.layers * width * decoder.hidden + layer if setting.checkpointing else decoder.layers * layer
    logits = 2 * width * setting.tokens * decoder.vocabulary
    return setting.tokens * kept + logits + min(CHUNK[setting.on_gpu], 2 * logits // width)


def _width(setting: Setting) -> int:
    """Return the bytes of a number that passes compute in."""
    return 2 if setting.precision == "bf16" else 4


def _stored(setting: Setting) -> int:
    """Return the bytes of a weight; without ZeRO bf16 is autocast, which leaves fp32 weights."""
    return 4 if setting.stage == 0 else _width(setting)


def _share(elements: int, setting: Setting) -> int:
    return math.ceil(elements / setting.world_size)


def _state(facts: Facts, setting: Setting) -> Need:
    trained, mine = facts.trainable, _share(facts.trainable, setting)
    whole = _stored(setting) * facts.parameters
    if setting.stage == 0:
        return Need(weights=whole, gradients=4 * trained, moments=8 * trained)
    apart = setting.precision == "bf16" or (setting.stage < 3 and setting.offload == "cpu" and setting.on_gpu)
    masters = 4 * mine if apart else 0
    if setting.stage == 1:
        summed = 6 if setting.precision == "bf16" else 4
        return Need(weights=whole, gradients=summed * trained, masters=masters, moments=8 * mine)
    if setting.stage == 2:
        return Need(weights=whole, gradients=4 * mine, masters=masters, moments=8 * mine)
    parted = _stored(setting) * _share(facts.parameters, setting)
    return Need(weights=parted, gradients=4 * mine, masters=masters, moments=8 * mine)


def _buffers(facts: Facts, setting: Setting) -> int:
    """Return what gradients are reduced through, and what of other ranks' weights is gathered."""
    alone = setting.world_size == 1
    if setting.stage == 0:
        casts = 2 * facts.parameters if setting.precision == "bf16" else 0
        return casts + (0 if alone else 4 * min(BUCKET, facts.trainable))
    if setting.stage == 1 and setting.precision == "bf16" and setting.offload == "none":
        return 0 if alone else 4 * min(BUCKET, facts.trainable)
    if setting.stage < 3:
        size = BUCKET if setting.on_gpu else min(BUCKET, facts.trainable)  # untouched pages of a CPU are none
        width = 4 if setting.stage == 1 else _width(setting)
        return width * size * (2 if setting.on_gpu else 1)
    live = LIVE if setting.on_gpu else SMALL_BUCKETS["stage3_max_live_parameters"]
    bucket = BUCKET if setting.on_gpu else min(SMALL_BUCKETS["reduce_bucket_size"], facts.trainable)
    gathered = 0 if alone else min(facts.parameters, max(live, facts.largest))
    return _width(setting) * (gathered + bucket)


def _step(facts: Facts, setting: Setting) -> int:
    """Return the copy of its gradients that a rank steps with, where the sums are not flat already."""
    if setting.stage == 3:
        most = LIVE if setting.on_gpu else max(SMALL_BUCKETS["sub_group_size"], facts.largest)
        return 4 * _share(min(facts.trainable, most), setting)
    if setting.stage and setting.precision == "fp32":
        return 4 * _share(facts.trainable, setting)
    return 0


def _placed(found: Need, facts: Facts, setting: Setting) -> Need:
    """Tell the host's part from the device's, where these are two."""
    saving = 12 * _share(facts.trainable, setting)
    if not setting.on_gpu:
        return replace(found, process=PROCESS, saving=saving)
    if setting.offload == "none":
        return replace(found, host=PROCESS + saving)
    mine = 4 * _share(facts.trainable, setting)
    host = PROCESS + saving + found.masters + found.moments + mine
    if setting.stage == 1:  # its sums are whole on the device, and this rank's part of them on the host
        return replace(found, masters=0, moments=0, step=0, host=host)
    if setting.stage == 2:
        return replace(found, gradients=0, masters=0, moments=0, step=0, host=host)
    # stage 3 keeps the gradients of each group twice there: as they come, and as the optimizer takes them
    return replace(found, weights=0, gradients=0, masters=0, moments=0, step=0, host=host + found.weights + mine)
