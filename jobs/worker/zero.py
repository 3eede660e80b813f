"""Spec and topology → DeepSpeed configuration. Pure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from cluster.precision import Precision
from jobs.spec import LoraSpec, TrainingSpec

_OURS = (
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16",
    "fp16",
    "torch_autocast",
)

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
        base: a user's own DeepSpeed JSON; its keys win, but for those the spec decides (batch, clipping, precision).
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
    return config if base is None else {**config, **base, **{key: config[key] for key in _OURS if key in config}}


def read_deepspeed_json(path: Path) -> dict[str, Any]:
    """Read a user's DeepSpeed JSON, dropping `"auto"` values (the Hugging Face convention for "you decide").

    Raises:
        UserError: unreadable, or it sets what the spec decides to another value.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"training.deepspeed: cannot read {path}: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"training.deepspeed: {path} holds a {type(config).__name__}, not an object")
    if "elasticity" in config:
        raise UserError(f"{path}: DeepSpeed 0.19 removed `elasticity`; Tandem keeps the batch exact at any world size")
    config = _without_auto(config)
    clash = [key for key in (*_OURS, "train_batch_size", "optimizer", "scheduler") if key in config]
    if clash:
        raise UserError(f"{path} sets {', '.join(clash)}: the spec's `training` section decides that; remove it there")
    return config


def read_named(training: TrainingSpec | None, base: Path) -> dict[str, Any] | None:
    """Return the DeepSpeed JSON that the spec names, None where it names none; relative paths start at `base`.

    Raises:
        UserError: see `read_deepspeed_json`.
    """
    if training is None or not isinstance(training.deepspeed, str):
        return None
    return read_deepspeed_json(base / training.deepspeed)


def stage_of(training: TrainingSpec, base: dict[str, Any] | None = None) -> int:
    """Return the ZeRO stage in force."""
    if isinstance(training.deepspeed, str):
        return int((base or {}).get("zero_optimization", {}).get("stage", 0))
    return training.deepspeed.zero_stage


def sliceable(config: dict[str, Any]) -> bool:
    """Return whether a rank's part of a parameter is a plain run of it in memory: stage 3, and nothing done to parts.

    Quantised weights, parts over fewer ranks (MiCS) and parameters on NVMe are DeepSpeed's own affair: such a model
    begins whole.
    """
    zero = config.get("zero_optimization", {})
    on_nvme = (zero.get("offload_param") or {}).get("device") == "nvme"
    odd = zero.get("zero_quantized_weights") or zero.get("mics_shard_size", -1) > 0 or on_nvme
    return zero.get("stage") == 3 and not odd


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
    if training.deepspeed.zero_stage == 3 and not on_gpu:
        zero |= SMALL_BUCKETS
    if training.deepspeed.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
        if training.deepspeed.zero_stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": on_gpu}
    return zero


def _without_auto(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_auto(inner) for key, inner in value.items() if inner != "auto"}
    return value
