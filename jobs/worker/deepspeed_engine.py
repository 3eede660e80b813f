"""One model and its optimizer, sharded by DeepSpeed over the worker group."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from cluster.errors import UserError
from jobs.checkpoint.resume import Fill
from jobs.checkpoint.shards import KINDS, Fragment, Reader, share
from jobs.spec import TrainingSpec
from jobs.worker import buffers, deepspeed_internals, partition, zero, zero_layouts
from jobs.worker.deepspeed_internals import Place, import_deepspeed


class Engine:
    """A DeepSpeed engine whose gradients are those of the loss it is given, at any world size and accumulation."""

    def __init__(
        self,
        model: torch.nn.Module,
        training: TrainingSpec,
        config: dict[str, Any],
        device: torch.device,
        fill: Fill | None = None,
    ) -> None:
        """Shard `model` over the ranks of the process group that Ray Train has set up.

        Args:
            model: on the CPU, in fp32; on the meta device where stage 3 divides it, so that no rank has it whole.
            fill: fills in its weights, where it is on the meta device.
        """
        deepspeed = import_deepspeed()
        self._config = config
        self.sliceable = zero.sliceable(config)
        """Whether this rank's part of a parameter is a plain run of it."""
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False)
        if training.gradient_checkpointing:
            check_checkpointing(model)
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
        self.device = device
        self._buffers = buffers.learned(model)
        self.rank = torch.distributed.get_rank()
        self.world_size = torch.distributed.get_world_size()
        if fill is not None and any(parameter.is_meta for parameter in model.parameters()):
            partition.divide(model, config, dtype_of(config), fill)
        optimizer = torch.optim.AdamW(
            parameter_groups(model.named_parameters(), training.weight_decay),
            lr=training.learning_rate,
            betas=training.betas,
            eps=training.epsilon,
            fused=True,
        )
        self.model, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
        buffers.match_types(self.model.module)
        self._adamw = optimizer
        self._mapped: dict[int, dict[str, torch.Tensor]] = {}
        """What is on NVMe, by the id of the optimizer's tensor that it belongs to."""
        self._clip = training.clip
        self._norm: torch.Tensor | None = None
        deepspeed_internals.replace_clipping(self.model, self._clip_and_note)
        self._alone = not self.model.zero_optimization()
        """Whether every rank holds all of the training state."""
        stage, found = self.model.zero_optimization_stage(), type(self.model.optimizer).__name__
        if stage == 3:
            deepspeed_internals.share_masters(self.model.optimizer)
            deepspeed_internals.begin_moments(self.model.optimizer, self._moments)
        self._layout = zero_layouts.choose(stage, self.model.optimizer)
        zero_layouts.check_sums(self._held(), self.elements(), f"ZeRO stage {stage} with DeepSpeed's {found}")

    def make_exact(self, fill: Fill) -> None:
        """Give the master weights what is not rounded: DeepSpeed makes them of weights in what is computed in."""
        for name, place in self._places():
            fill(name, place.start, zero_layouts.view(place, self._states(place.flat)["weight"]))

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of `loss`, a scalar. Over the ranks they are summed, as if one rank had seen it all.

        DeepSpeed averages over ranks and divides by the accumulation steps; both are undone here, so that the
        caller's normalisation (by the targets of the global batch) is the only one.
        """
        self.model.backward(loss * self.world_size, scale_wrt_gas=False)

    def step(self) -> None:
        """End a micro-batch; after the last of a global batch this clips and applies the gradients.

        Of gradients that are not finite, ZeRO applies none and says nothing; without ZeRO they spoil the weights. The
        caller looks at `gradient_norm`.
        """
        if self._alone and not self._clip and self.model.is_gradient_accumulation_boundary():
            self._clip_and_note()  # DeepSpeed does not where there is nothing to clip
        self.model.step()

    def average_buffers(self) -> None:
        """Make the ranks' running statistics the same, after a step. Collective."""
        buffers.average(self._buffers)

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the rate of the next optimiser step."""
        for group in self.model.optimizer.param_groups:
            group["lr"] = learning_rate

    def gradient_norm(self) -> float:
        """Return the norm of the last gradient, before clipping, the same on all ranks; not finite if it is not."""
        norm = self._norm if self._norm is not None else self.model.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")

    def _clip_and_note(self) -> None:
        self._norm = torch.nn.utils.clip_grad_norm_(self.model.module.parameters(), self._clip or math.inf)

    def all_sum(self, *values: torch.Tensor | float) -> list[float]:
        """Sum each value over the ranks, in one collective."""
        vector = torch.stack([torch.as_tensor(v, device=self.device).double() for v in values])
        if self.world_size > 1:
            torch.distributed.all_reduce(vector)
        return vector.tolist()

    def elements(self) -> dict[str, int]:
        """Return the elements of each trained parameter, whole: what a checkpoint must hold."""
        return {name: self._layout.numel(parameter) for name, parameter in zero_layouts.trainable(self.model.module)}

    @property
    def in_files(self) -> bool:
        """Whether training state is on NVMe."""
        return bool(self._mapped)

    def fragments(self) -> list[Fragment]:
        """Return the training state that this rank holds, as views of it (1-D, fp32).

        With ZeRO the ranks' parts cover it once; without, every rank holds all of it (`owned_fragments` divides it).
        """
        return [
            Fragment(name, place.start, _views(self._states(place.flat), place), in_files=not place.flat.numel())
            for name, place in self._places()
        ]

    def owned_fragments(self) -> list[Fragment]:
        """Return this rank's part of the training state: over the ranks, everything once."""
        held = self.fragments()
        return held if self._layout.partitioned else share(held, self.rank, self.world_size)

    def restore(self, reader: Reader, updates: int) -> None:
        """Put a checkpoint's state in place, whatever group wrote it; the model was built from its weights already.

        DeepSpeed makes its master weights from the model after rounding it to bf16, so those are read once more.
        """
        for name, place in self._places():
            for kind, tensor in _views(self._states(place.flat, updates), place).items():
                reader.read(kind, name, place.start, tensor)

    def _places(self) -> Iterator[tuple[str, Place]]:
        """Yield what this rank holds, by parameter."""
        for name, parameter in zero_layouts.trainable(self.model.module):
            place = self._layout.place(parameter, self.model.optimizer, self.rank)
            if place is not None:
                yield name, place

    def _held(self) -> dict[str, int]:
        """Return how many elements of each parameter the ranks hold together. Collective."""
        mine = {name: zero_layouts.view(place, self._weight(place.flat)).numel() for name, place in self._places()}
        if not self._layout.partitioned:
            return mine
        names = list(self.elements())
        return dict(zip(names, map(int, self.all_sum(*(mine.get(name, 0) for name in names))), strict=True))

    def _states(self, flat: torch.Tensor, updates: int = 0) -> dict[str, torch.Tensor]:
        """Return a tensor of the optimizer's and AdamW's state of it, each (N,) fp32, in memory or in its swap file.

        State is made where the first step has not; with `updates`, its step is set.
        """
        moments = self._moments(flat)
        if updates:
            moments["step"].fill_(updates)
        if (found := self._in_files(flat)) is not None:
            return found
        return {"weight": flat, "exp_avg": moments["exp_avg"], "exp_avg_sq": moments["exp_avg_sq"]}

    def _weight(self, flat: torch.Tensor) -> torch.Tensor:
        return (self._in_files(flat) or {"weight": flat})["weight"]

    def _in_files(self, flat: torch.Tensor) -> dict[str, torch.Tensor] | None:
        """Return what lies on NVMe of one of the optimizer's tensors, (N,) fp32, mapped; None: it is in memory."""
        paths, numel = deepspeed_internals.swap_files(self.model.optimizer, flat)
        if not paths:
            return None
        if id(flat) not in self._mapped:
            mapped = [torch.from_file(str(path), shared=True, size=numel, dtype=torch.float32) for path in paths]
            self._mapped[id(flat)] = dict(zip(KINDS, mapped, strict=True))
        return self._mapped[id(flat)]

    def _moments(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        states = self._adamw.state
        if not states[flat]:
            states[flat] = {
                "step": torch.zeros((), dtype=torch.float32, device=flat.device),
                "exp_avg": torch.zeros_like(flat.detach()),
                "exp_avg_sq": torch.zeros_like(flat.detach()),
            }
        return states[flat]

    def forget_moments(self) -> None:
        """Let go of the optimizer's moments: nothing is learned any more."""
        self._adamw.state.clear()
        self._mapped.clear()

    def divided(self, model: torch.nn.Module, fill: Fill) -> torch.nn.Module:
        """Return a model, on the meta device before, in parts as this one is: to be run, not to learn. Collective."""
        partition.divide(model, self._config, dtype_of(self._config), fill)
        return deepspeed_internals.for_reading(model, self._config)

    def state_dict(self) -> dict[str, torch.Tensor] | None:
        """Return the model's weights, each in its whole shape, on the CPU at rank 0, None elsewhere. Collective."""
        if self.model.zero_optimization_partition_weights():
            return deepspeed_internals.consolidated_weights(self.model)
        return {k: v.detach().cpu() for k, v in self.model.module.state_dict().items()} if self.rank == 0 else None


def _views(states: dict[str, torch.Tensor], place: Place) -> dict[str, torch.Tensor]:
    return {kind: zero_layouts.view(place, tensor) for kind, tensor in states.items()}


def parameter_groups(named: Iterable[tuple[str, torch.nn.Parameter]], weight_decay: float) -> Iterator[dict[str, Any]]:
    """Split trainable parameters into those that decay (matrices) and those that do not (biases, norms)."""
    trainable = [p for _, p in named if p.requires_grad]
    for members, decay in (
        ([p for p in trainable if _dimensions(p) >= 2], weight_decay),
        ([p for p in trainable if _dimensions(p) < 2], 0.0),
    ):
        if members:
            yield {"params": members, "weight_decay": decay}


def _dimensions(parameter: torch.nn.Parameter) -> int:
    """Return how many a parameter has, also one that is in parts."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def dtype_of(config: dict[str, Any]) -> torch.dtype:
    """Return what the weights are in that a configuration computes with."""
    return torch.bfloat16 if config.get("bf16", {}).get("enabled") else torch.float32


def check_checkpointing(model: torch.nn.Module) -> None:
    """Refuse a model whose layers cannot be computed again.

    Raises:
        UserError: it is one.
    """
    inner = getattr(model, "base_model", model)  # adapters answer for themselves
    if not getattr(getattr(inner, "model", inner), "supports_gradient_checkpointing", False):
        raise UserError(
            f"training.gradient_checkpointing: {type(model).__name__} cannot compute its layers again; leave it out"
        )
