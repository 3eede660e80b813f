"""How a model is trained, and what that takes of a rank's memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from cluster.precision import Precision

MIB = 1 << 20
FREE = 0.1
"""This share of the memory is left to the system; of a GPU's, to CUDA, NCCL and fragments."""

Offload = Literal["none", "cpu"]
Recomputed = bool | Literal["selective"]
Optimizer = Literal["adamw", "muon"]


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
    checkpointing: Recomputed = False
    """Activations are computed again in the backward pass: all, or all but the outputs of products and attention."""
    micro_batches: int = 1
    """Of a rank, in a step."""
    process_bytes: int = 0
    """Of a worker without a model; 0: not known."""
    in_files: bool = False
    """Parameters are on NVMe, at stage 3, but for small ones."""
    optimizer: Optimizer = "adamw"
    undivided: str = ""
    """Why weights are not to be divided, which leaves stage 3 out; empty: they may be."""

    @property
    def width(self) -> int:
        """Bytes of a number that passes compute in."""
        return 2 if self.precision == "bf16" else 4

    @property
    def stored(self) -> int:
        """Bytes of a weight; without ZeRO bf16 is autocast, which leaves fp32 weights."""
        return 4 if self.stage == 0 else self.width

    @property
    def masters_apart(self) -> bool:
        """Say whether the optimizer's fp32 weights are others than those that passes compute with."""
        elsewhere = self.on_gpu and self.offload == "cpu" and self.stage in (1, 2)
        return self.stage > 0 and (self.precision == "bf16" or elsewhere or self.in_files)

    @property
    def named(self) -> str:
        """The stage as a reader calls it."""
        offload = ", offload" if self.offload == "cpu" else ""
        return f"{self.stage}{offload}{', parameters on NVMe' if self.in_files else ''}"

    @property
    def stages(self) -> tuple[int, ...]:
        """The ZeRO stages that there are for it."""
        return (0, 1, 2) if self.undivided else (0, 1, 2, 3)

    def share(self, elements: int) -> int:
        """Return one rank's part of so many."""
        return math.ceil(elements / self.world_size)


@dataclass(frozen=True)
class Need:
    """Bytes of one rank on the device that computes, and on its host."""

    weights: int = 0
    gradients: int = 0
    """As they are summed, when the backward pass is over."""
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
    """The copy that a checkpoint is written from; it stays until training ends."""
    host: int = 0
    """All of it that lies in the host's memory, where the device has its own."""
    most: int = 0
    """The most at once of gradients, activations, buffers and step, which are not there together."""

    @property
    def state(self) -> int:
        """What is there when a step begins and ends, with its gradients."""
        return self.weights + self.gradients + self.masters + self.moments + self.process

    @property
    def unsaved_peak(self) -> int:
        """The most at once on the device, as long as no checkpoint is written."""
        return self.state - self.gradients + self.most

    @property
    def peak(self) -> int:
        """The most at once on the device."""
        return self.unsaved_peak + self.saving

    def fits(self, memory_bytes: int) -> bool:
        """Say whether it fits into a device's memory, of which a tenth is left free."""
        return self.peak <= memory_bytes * (1 - FREE)
