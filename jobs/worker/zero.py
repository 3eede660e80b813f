"""Spec and topology → DeepSpeed configuration. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from cluster.precision import Precision
from jobs.spec import LoraSpec, TrainingSpec
from jobs.worker import deepspeed_json

SMALL_BUCKETS = {
    "stage3_max_live_parameters": 10_000_000,
    "stage3_max_reuse_distance": 10_000_000,
    "stage3_prefetch_bucket_size": 5_000_000,
    "reduce_bucket_size": 10_000_000,
    "sub_group_size": 10_000_000,
}
"""In elements, on a CPU, where a collective is a copy and larger ones are no faster.

DeepSpeed's own are 1e9, 1e9, 5e7, 5e8 and 1e9, with which a rank of a smaller model holds all of it.
"""


PERSISTENT = 100_000
"""Elements of a parameter that stays gathered at stage 3, and in memory where others are in files: DeepSpeed's own."""

SUMMED_ALONE = 1 << 20
"""Elements from which a gradient is summed over the ranks by itself, without ZeRO and at stage 1 in bf16: the time of
another collective is nothing beside its own. Smaller ones are copied behind each other."""
SUMMED_AT_ONCE = 1 << 25
"""Elements of such a gradient that are summed, and at stage 1 copied to bf16 for that, at a time."""

SWAP_BUFFERS = 4
"""Of the largest sub-group each, for offload to NVMe: its masters, both moments and its gradients."""


def deepspeed_config(
    training: TrainingSpec,
    micro_batch: int,
    accumulation: int,
    *,
    precision: Precision,
    on_gpu: bool,
    base: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the configuration for `deepspeed.initialize`.

    Args:
        micro_batch: rows per forward pass on one rank.
        accumulation: micro-batches per optimiser step.
        precision: what the run computes in; the spec may say `auto`.
        on_gpu: overlap communication with the backward pass (there is no second stream on a CPU).
        base: a user's own DeepSpeed JSON, as jobs/worker/deepspeed_json.py reads it: its keys win.
    """
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": training.clip,
        "zero_optimization": _zero(training, on_gpu),
        **_precision(precision, stage_of(training, base)),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "wall_clock_breakdown": False,
        "steps_per_print": 2**31 - 1,
    }
    if training.compile and on_gpu and stage_of(training, base) == 3:
        config["compile"] = {"deepcompile": True}  # torch.compile alone stops at each hook that gathers weights
    return {**config, **(base or {})}


def read_named(training: TrainingSpec | None, base: Path) -> dict[str, Any] | None:
    """Return the DeepSpeed JSON that the spec names, None where it names none; relative paths start at `base`.

    Raises:
        UserError: see jobs/worker/deepspeed_json.py.
    """
    if training is None or not isinstance(training.deepspeed, str):
        return None
    return deepspeed_json.read(base / training.deepspeed)


def with_swap_folder(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return a configuration for offload to NVMe whose files lie in `folder`."""
    zero = config["zero_optimization"]
    placed = {
        key: {**zero[key], "nvme_path": str(folder)}
        for key in ("offload_optimizer", "offload_param")
        if zero[key]["device"] == "nvme"
    }
    return {**config, "zero_optimization": {**zero, **placed}}


def stage_of(training: TrainingSpec, base: dict[str, Any] | None = None) -> int:
    """Return the ZeRO stage in force; `auto` has been decided by now (jobs/driver/zero_stage.py)."""
    if isinstance(training.deepspeed, str):
        return int((base or {}).get("zero_optimization", {}).get("stage", 0))
    assert training.deepspeed.zero_stage != "auto", "no stage was chosen"
    return training.deepspeed.zero_stage


def offloads(zero: Mapping[str, Any]) -> bool:
    """Say whether DeepSpeed's `zero_optimization` has optimizer states elsewhere; `device` is none by default. Pure."""
    return bool(zero.get("offload_optimizer", {}).get("device", "none") != "none")


def sliceable(config: dict[str, Any]) -> bool:
    """Return whether a rank's part of a parameter is a plain run of it in memory: ZeRO stage 3."""
    return config.get("zero_optimization", {}).get("stage") == 3


def check_base(lora: LoraSpec | None, config: dict[str, Any]) -> None:
    """Refuse to divide weights of few bits, where a user's own JSON asks for it; the spec's rules do otherwise.

    Raises:
        UserError: it does.
    """
    if lora is not None and lora.base != "whole" and config.get("zero_optimization", {}).get("stage") == 3:
        raise UserError(
            f"model.lora.base: {lora.base} is held whole by every worker, and training.deepspeed asks for stage 3: "
            "take stage 2 there, or leave base out"
        )


def _precision(precision: Precision, stage: int) -> dict[str, Any]:
    """bf16 weights with fp32 masters and fp32 gradient sums where ZeRO keeps them; else fp32 weights and autocast.

    Without ZeRO, DeepSpeed's bf16 has neither masters nor fp32 sums (`DDP_BFLOAT16` in its engine.py).
    """
    if precision == "fp32":
        return {}
    if stage == 0:
        return {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    return {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}


def _zero(training: TrainingSpec, on_gpu: bool) -> dict[str, Any]:
    if isinstance(training.deepspeed, str):
        return {}
    zero: dict[str, Any] = {
        "stage": training.deepspeed.zero_stage,
        "overlap_comm": on_gpu,
        "contiguous_gradients": True,
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    if training.deepspeed.zero_stage in (1, 2) and not on_gpu:
        # DeepSpeed 0.19 copies the buffer of gradients to sum it by ranks, all of it on each, and copies that back.
        zero["reduce_scatter"] = False
    if training.deepspeed.zero_stage == 3 and not on_gpu:
        zero |= SMALL_BUCKETS
    if training.deepspeed.offload != "none":
        zero["offload_optimizer"] = {"device": training.deepspeed.offload, "pin_memory": on_gpu}
        if training.deepspeed.zero_stage == 3:
            zero["offload_param"] = {"device": training.deepspeed.offload_parameters, "pin_memory": on_gpu}
    if training.deepspeed.offload == "nvme":
        zero["offload_optimizer"] |= {"nvme_path": training.deepspeed.nvme_path, "buffer_count": SWAP_BUFFERS}
        # Each parameter by itself: of a gradient that begins between two blocks of its sub-group's, DeepSpeed 0.19
        # reads nothing (direct I/O refuses it), does not look, and steps with what was in the buffer.
        zero["sub_group_size"] = 1
    if training.deepspeed.offload_parameters == "nvme":
        zero["offload_param"] |= {"nvme_path": training.deepspeed.nvme_path, "max_in_cpu": 0}
        zero["stage3_param_persistence_threshold"] = PERSISTENT
    return zero
