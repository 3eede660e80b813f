"""The only importer of deepspeed: one model and its optimizer, sharded over the worker group."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from jobs.checkpoint.shards import Fragment, Reader, share
from jobs.spec import TrainingSpec


class Engine:
    """A DeepSpeed engine whose gradients are those of the loss it is given, at any world size and accumulation."""

    def __init__(
        self, model: torch.nn.Module, training: TrainingSpec, config: dict[str, Any], device: torch.device
    ) -> None:
        """Shard `model` (on the CPU, in fp32) over the ranks of the process group that Ray Train has set up."""
        deepspeed = import_deepspeed()
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False)
        if training.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
        self.device = device
        self.rank = torch.distributed.get_rank()
        self.world_size = torch.distributed.get_world_size()
        optimizer = torch.optim.AdamW(
            parameter_groups(model.named_parameters(), training.weight_decay),
            lr=training.learning_rate,
            betas=training.betas,
            eps=training.epsilon,
            fused=True,
        )
        self.model, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
        self._adamw = optimizer
        self._clip = training.clip
        self._norm: torch.Tensor | None = None
        self.model.clip_fp32_gradients = self._clip_and_note  # without ZeRO, DeepSpeed forgets the norm it clips by

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of `loss`, a scalar. Over the ranks they are summed, as if one rank had seen it all.

        DeepSpeed averages over ranks and divides by the accumulation steps; both are undone here, so that the
        caller's normalisation (by the targets of the global batch) is the only one.
        """
        self.model.backward(loss * self.world_size, scale_wrt_gas=False)

    def step(self) -> None:
        """End a micro-batch; after the last of a global batch this clips and applies the gradients."""
        self.model.step()

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the rate of the next optimiser step."""
        for group in self.model.optimizer.param_groups:
            group["lr"] = learning_rate

    def gradient_norm(self) -> float:
        """Return the norm of the last applied gradient, before clipping."""
        norm = self._norm if self._norm is not None else self.model.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")

    def _clip_and_note(self) -> None:
        self._norm = torch.nn.utils.clip_grad_norm_(self.model.module.parameters(), self._clip)

    def all_sum(self, *values: torch.Tensor | float) -> list[float]:
        """Sum each value over the ranks, in one collective."""
        vector = torch.stack([torch.as_tensor(v, device=self.device).double() for v in values])
        if self.world_size > 1:
            torch.distributed.all_reduce(vector)
        return vector.tolist()

    def fragments(self) -> list[Fragment]:
        """Return the training state that this rank holds, as views of it.

        With ZeRO the ranks' parts cover it once; without, every rank holds all of it (`owned_fragments` divides it).
        """
        return [
            Fragment(name, start, _views(self._states(flat), flat, offset, numel))
            for name, flat, start, offset, numel in self._pieces()
        ]

    def owned_fragments(self) -> list[Fragment]:
        """Return this rank's part of the training state: over the ranks, everything once."""
        held = self.fragments()
        return held if self._is_partitioned() else share(held, self.rank, self.world_size)

    def restore(self, reader: Reader, updates: int) -> None:
        """Put a checkpoint's state in place, whatever group wrote it; the model was built from its weights already.

        DeepSpeed makes its master weights from the model after rounding it to bf16, so those are read once more.
        """
        for name, flat, start, offset, numel in self._pieces():
            for kind, tensor in _views(self._states(flat, updates), flat, offset, numel).items():
                reader.read(kind, name, start, tensor)

    def _pieces(self) -> Iterator[tuple[str, torch.Tensor, int, int, int]]:
        """Yield (parameter, optimizer's tensor, first element in the parameter, offset in that tensor, elements)."""
        optimizer = self.model.optimizer
        for name, parameter in self.model.module.named_parameters():
            if not parameter.requires_grad:
                continue
            if hasattr(parameter, "ds_tensor"):  # stage 3: every parameter in equal parts, the last one padded
                group, offset, part = optimizer.grad_position[optimizer.get_param_id(parameter)]
                start = self.rank * part
                numel = min(part, parameter.ds_numel - start)
                if numel > 0:
                    yield name, optimizer.fp32_partitioned_groups_flat[group], start, offset, numel
            elif hasattr(parameter, "_hp_mapping"):  # stages 1 and 2: the concatenated group in equal parts
                mapping = parameter._hp_mapping
                if mapping is not None:
                    groups = _flat_groups(optimizer)
                    where, lies = mapping.lp_fragment_address, mapping.hp_fragment_address
                    yield name, groups[mapping.param_group_index], where.start, lies.start, where.numel
            else:
                yield name, parameter, 0, 0, parameter.numel()

    def _is_partitioned(self) -> bool:
        parameters = [p for p in self.model.module.parameters() if p.requires_grad]
        return any(hasattr(p, "ds_tensor") or hasattr(p, "_hp_mapping") for p in parameters)

    def _states(self, flat: torch.Tensor, updates: int = 0) -> dict[str, torch.Tensor]:
        """Return AdamW's state of one of its tensors; make it where the first step has not, or set its step."""
        states = self._adamw.state
        if not states[flat]:
            states[flat] = {
                "step": torch.zeros((), dtype=torch.float32, device=flat.device),
                "exp_avg": torch.zeros_like(flat.detach()),
                "exp_avg_sq": torch.zeros_like(flat.detach()),
            }
        if updates:
            states[flat]["step"].fill_(updates)
        return states[flat]

    def state_dict(self) -> dict[str, torch.Tensor] | None:
        """Return the whole model's weights on the CPU at rank 0, None elsewhere. Collective."""
        if self.model.zero_optimization_partition_weights():
            return self.model._zero3_consolidated_16bit_state_dict()
        return {k: v.detach().cpu() for k, v in self.model.module.state_dict().items()} if self.rank == 0 else None


def import_deepspeed() -> Any:
    """Import deepspeed (0.19) without what costs a job's start and is not used: mlflow (1.4 s), TorchInductor (5 s)."""
    with _without_mlflow(), _without_compiler():
        import deepspeed
        import deepspeed.runtime.bf16_optimizer
        import deepspeed.runtime.zero.muon.muon_optimizer
    # Only inference collectives use this C++ extension; compiling it would need a compiler at the first job.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # The bf16 optimizer reports memory at every stage of its construction: 3 s of garbage collection and prints.
    deepspeed.runtime.bf16_optimizer.see_memory_usage = lambda *arguments, **keywords: None
    return deepspeed


def _views(states: dict[str, torch.Tensor], flat: torch.Tensor, offset: int, numel: int) -> dict[str, torch.Tensor]:
    whole = {"weight": flat, "exp_avg": states["exp_avg"], "exp_avg_sq": states["exp_avg_sq"]}
    return {kind: tensor.detach().view(-1)[offset : offset + numel] for kind, tensor in whole.items()}


def _flat_groups(optimizer: Any) -> list[torch.Tensor]:
    """Return the fp32 partitions of DeepSpeed's optimizer for bf16, or of that for stages 1 and 2."""
    if hasattr(optimizer, "fp32_groups_flat_partition"):
        return optimizer.fp32_groups_flat_partition
    return optimizer.single_partition_of_fp32_groups


@contextmanager
def _without_mlflow() -> Iterator[None]:
    """Keep the autotuner from importing mlflow."""
    loaded = sys.modules.get("mlflow")
    if loaded is None:
        sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if loaded is None:
            del sys.modules["mlflow"]


@contextmanager
def _without_compiler() -> Iterator[None]:
    """Keep decorators from importing the whole compiler: every ZeRO engine imports Muon, whose steps are compiled."""
    compile_, torch.compile = torch.compile, lambda function, *arguments, **keywords: function  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_


def parameter_groups(named: Iterable[tuple[str, torch.nn.Parameter]], weight_decay: float) -> Iterator[dict[str, Any]]:
    """Split trainable parameters into those that decay (matrices) and those that do not (biases, norms)."""
    trainable = [p for _, p in named if p.requires_grad]
    for members, decay in (
        ([p for p in trainable if p.dim() >= 2], weight_decay),
        ([p for p in trainable if p.dim() < 2], 0.0),
    ):
        if members:
            yield {"params": members, "weight_decay": decay}
