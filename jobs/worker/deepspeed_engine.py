"""One model and its optimizer, sharded by DeepSpeed over the worker group."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch

from jobs.checkpoint.resume import Fill, gathered
from jobs.checkpoint.shards import KINDS, MUON, Fragment, Reader, share
from jobs.spec import TrainingSpec
from jobs.tasks import cross_entropy
from jobs.worker import (
    buffers,
    deepspeed_internals,
    heap,
    optimizers,
    partition,
    recomputing,
    replica,
    swap_internals,
    zero,
    zero_layouts,
)
from jobs.worker.deepspeed_internals import Place, import_deepspeed
from jobs.worker.muon import Matrix, MuonAndAdamW, dealt


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
            model: on the CPU, in fp32; on the meta device where its weights are known by the slice.
            fill: fills them in then.
        """
        heap.lean()
        deepspeed = import_deepspeed()
        self._config = config
        self.sliceable = zero.sliceable(config)
        """Whether this rank's part of a parameter is a plain run of it."""
        self._rounded = dtype_of(config) != torch.float32
        """Whether DeepSpeed makes its master weights of rounded ones."""
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False)
        if training.gradient_checkpointing:
            recomputing.enable(model, training.gradient_checkpointing, training.compile)
        self.device = device
        self._buffers = buffers.learned(model)
        self.rank = torch.distributed.get_rank()
        self.world_size = torch.distributed.get_world_size()
        self.matrices = optimizers.matrices_of(model) if training.optimizer == "muon" else frozenset()
        """Names of the parameters that Muon trains."""
        flats = {}
        if fill is not None and any(parameter.is_meta for parameter in model.parameters()):
            flats = self._fill(model, fill)
        optimizer = optimizers.make(model, training, self.matrices, computes_in(config), device)
        self.model = deepspeed_internals.initialize(model, optimizer, config, partial(replica.flatten, flats))
        buffers.match_types(self.model.module)
        self._optimizer = optimizer
        self._mapped: dict[int, dict[str, torch.Tensor]] = {}
        """What is on NVMe, by the id of the optimizer's tensor that it belongs to."""
        self._clip = training.clip
        self._norm: torch.Tensor | None = None
        self._moments_made = False
        """Whether a first update has made all that stays."""
        deepspeed_internals.replace_clipping(self.model, self._clip_and_note)
        deepspeed_internals.reduce_in_place(self.model)
        self._alone = not self.model.zero_optimization()
        """Whether every rank holds all of the training state."""
        stage, found = self.model.zero_optimization_stage(), type(self.model.optimizer).__name__
        deepspeed_internals.share_masters(self.model.optimizer, stage)
        if stage == 3:
            swap_internals.begin_moments(self.model.optimizer, self._states)
        self._layout = zero_layouts.choose(stage, self.model.optimizer)
        zero_layouts.check_sums(self._held(), self.elements(), f"ZeRO stage {stage} with DeepSpeed's {found}")
        if isinstance(optimizer, MuonAndAdamW):
            optimizer.lay_out(dealt(self._matrices()))

    def _fill(self, model: torch.nn.Module, fill: Fill) -> replica.Flats:
        """Give a model on the meta device its weights: this rank's parts, or all; return where groups lie flat."""
        dtype, stage = dtype_of(self._config), self._config.get("zero_optimization", {}).get("stage", 0)
        if self.sliceable:
            partition.divide(model, self._config, dtype, fill)
            return {}
        groups = optimizers.parameter_groups(model.named_parameters(), 0.0, self.matrices) if stage in (1, 2) else ()
        members = [group["params"] for group in groups]
        device = torch.device("cpu") if stage == 3 else self.device  # DeepSpeed moves parts, not a whole model
        return replica.build(model, fill, dtype, device, members, self.world_size)

    def make_exact(self, fill: Fill) -> None:
        """Give the master weights what is not rounded, where DeepSpeed has made them of what is, or in files."""
        for name, place in self._places():
            if self._rounded or self._files(place.flat):
                fill(name, place.start, zero_layouts.view(place, self._weight(place.flat)))

    def compile(self) -> None:
        """Have the model run compiled from its next call on.

        Dropout draws what it draws without: each start takes its first passes as they are written, and a run that goes
        on has to be the unbroken one. The loss is compiled with it, but by DeepCompile, which takes every graph for a
        part of the model.
        """
        if self.model.is_deepcompile_enabled():
            self.model.compile(compile_kwargs={})
            return
        self.model.compile(compile_kwargs={"options": {"fallback_random": True}})
        cross_entropy.by_compiler()

    def eager(self) -> AbstractContextManager[Any]:
        """Return a context in which a compiled model runs as it is written."""
        return torch.compiler.set_stance("force_eager") if self.model.is_compiled else nullcontext()

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
        updates = self.model.is_gradient_accumulation_boundary()
        if self._alone and not self._clip and updates:
            self._clip_and_note()  # DeepSpeed does not where there is nothing to clip
        self.model.step()
        if updates and not self._moments_made:
            self._moments_made = True
            heap.fast()

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
        """Whether training state is on NVMe: the same on all ranks, whose parts of a parameter are equally long."""
        return bool(self._mapped)

    def fragments(self) -> list[Fragment]:
        """Return the training state that this rank holds, as views of it (1-D, fp32).

        With ZeRO the ranks' parts cover it once; without, every rank holds all of it (`owned_fragments` divides it).
        """
        return [Fragment(name, place.start, self._views(name, place)) for name, place in self._places()]

    def owned_fragments(self) -> list[Fragment]:
        """Return this rank's part of the training state: over the ranks, everything once."""
        held = self.fragments()
        return held if self._layout.partitioned else share(held, self.rank, self.world_size)

    def restore(self, reader: Reader, updates: int) -> None:
        """Put a checkpoint's state in place, whatever group wrote it; the model was built from its weights already.

        DeepSpeed makes its master weights of the model's, which may be rounded: then they are read once more, as they
        are where they lie in files.
        """
        for name, place in self._places():
            for kind, tensor in self._views(name, place, updates).items():
                if kind != "weight" or self._rounded or self._files(place.flat):
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

    def _matrices(self) -> dict[torch.Tensor, list[Matrix]]:
        """Return Muon's matrices by the optimizer's tensors in which they lie, in one order on all ranks. Collective.

        A rank may hold nothing of a matrix.
        """
        places = {name: place for name, place in self._places() if name in self.matrices}
        mine = {name: place.numel for name, place in places.items()}
        held = gathered(mine) if self._layout.partitioned else [mine]
        found: dict[torch.Tensor, list[Matrix]] = {}
        for name, parameter in zero_layouts.trainable(self.model.module):
            if name in self.matrices:
                flat = self._layout.tensor(parameter, self.model.optimizer)
                offset = places[name].offset if name in places else 0
                rows, columns = optimizers.shape_of(parameter)
                matrix = Matrix(rows, columns, offset, tuple(each.get(name, 0) for each in held))
                found.setdefault(flat, []).append(matrix)
        return found

    def _views(self, name: str, place: Place, updates: int = 0) -> dict[str, torch.Tensor]:
        """Return by kind what is held of a parameter, 1-D: views of the training state.

        The first step makes the optimizer's states; where there are none, they are made here.

        Args:
            updates: those behind the state that is about to be read, 0 where none is.
        """
        kinds = MUON if name in self.matrices else KINDS
        states = self._states(place.flat, kinds)
        if updates and kinds is KINDS:
            states["step"].fill_(updates)
        whole = self._files(place.flat) or {"weight": place.flat, **{kind: states[kind] for kind in kinds[1:]}}
        return {kind: zero_layouts.view(place, tensor) for kind, tensor in whole.items()}

    def _states(self, flat: torch.Tensor, kinds: Sequence[str] = KINDS) -> dict[str, torch.Tensor]:
        """Return the optimizer's state of one of its tensors, (N,) fp32, made where it is not there."""
        states: dict[str, torch.Tensor] = self._optimizer.state[flat]
        for kind in kinds[1:]:
            if kind not in states:
                states[kind] = torch.zeros_like(flat.detach())
        if kinds is KINDS:
            states.setdefault("step", torch.zeros((), dtype=torch.float32, device=flat.device))
        return states

    def _weight(self, flat: torch.Tensor) -> torch.Tensor:
        """Return the master weights (N,) of one of the optimizer's tensors, wherever they are."""
        return self._files(flat).get("weight", flat)

    def _files(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what lies on NVMe of one of the optimizer's tensors, (N,) fp32, mapped; nothing: it is in memory."""
        if id(flat) not in self._mapped:
            paths, numel = swap_internals.swap_files(self.model.optimizer, flat)
            if not paths:
                return {}
            mapped = [torch.from_file(str(path), shared=True, size=numel, dtype=torch.float32) for path in paths]
            self._mapped[id(flat)] = dict(zip(KINDS, mapped, strict=True))
        return self._mapped[id(flat)]

    def unmade_bytes(self) -> int:
        """Return what AdamW's moments will take on this rank that are not there before the first step."""
        mine = (tensor for group in self._optimizer.param_groups for tensor in group["params"])
        return sum(
            2 * tensor.numel() * tensor.element_size() for tensor in mine if not self._optimizer.state.get(tensor)
        )

    def forget_moments(self) -> None:
        """Let go of the optimizer's moments: nothing is learned any more."""
        self._optimizer.state.clear()
        self._mapped.clear()

    def settle(self) -> None:
        """Have nothing be under way between the ranks after a pass, as an optimizer step does. Collective."""
        if self.model.zero_optimization_partition_weights():
            deepspeed_internals.take_back(self.model)

    def divided(self, model: torch.nn.Module, fill: Fill) -> torch.nn.Module:
        """Return a model, on the meta device before, in parts as this one is: to be run, not to learn. Collective."""
        partition.divide(model, self._config, dtype_of(self._config), fill)
        return deepspeed_internals.for_reading(model, self._config)

    def state_dict(self) -> dict[str, torch.Tensor] | None:
        """Return the model's weights, each in its whole shape, on the CPU at rank 0, None elsewhere. Collective."""
        if self.model.zero_optimization_partition_weights():
            return deepspeed_internals.consolidated_weights(self.model)
        return {k: v.detach().cpu() for k, v in self.model.module.state_dict().items()} if self.rank == 0 else None


def dtype_of(config: dict[str, Any]) -> torch.dtype:
    """Return what the weights are in that a configuration computes with."""
    return torch.bfloat16 if config.get("bf16", {}).get("enabled") else torch.float32


def computes_in(config: dict[str, Any]) -> torch.dtype:
    """Return what a configuration's matrix products are computed in."""
    return torch.bfloat16 if config.get("torch_autocast", {}).get("enabled") else dtype_of(config)
