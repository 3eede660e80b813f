"""What DeepSpeed 0.19 reads from its JSON, and what becomes of each key under Tandem's loop. Tables, no more.

Three kinds: the spec decides it; it is let through, at the ZeRO stages at which DeepSpeed looks at it; it is refused,
since it would change what is learned, or since nothing would come of it. docs/deepspeed.md shows them as one table, and
a contract test holds them against the keys that the installed DeepSpeed reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


class Takes(NamedTuple):
    """A kind of value."""

    fits: Callable[[Any], bool]
    words: str


def _whole(value: Any, least: int) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and least <= value < 2**63 and value == int(value)  # 5e8 is how such files write it


FLAG = Takes(lambda value: isinstance(value, bool), "true or false")
COUNT = Takes(lambda value: _whole(value, 0), "a whole number from 0")
SIZE = Takes(lambda value: _whole(value, 1), "a whole number from 1")
SECTION = Takes(lambda value: isinstance(value, dict), "an object")
NAMES = Takes(
    lambda value: isinstance(value, str) or (isinstance(value, list) and all(isinstance(each, str) for each in value)),
    "a name or a list of names",
)


def one_of(*values: str) -> Takes:
    """Return the kind that has these values."""
    return Takes(lambda value: value in values, " or ".join(f'"{value}"' for value in values))


@dataclass(frozen=True)
class Honoured:
    """DeepSpeed does what it says, and the same is learned."""

    takes: Takes
    stages: tuple[int, ...] = (0, 1, 2, 3)
    """Where DeepSpeed looks at it."""
    needs_log: bool = False
    """It prints, which is seen only with `log_level` info or debug."""


@dataclass(frozen=True)
class Refused:
    """It would change what is learned, or nothing would come of it."""

    why: str
    """… and the way out."""
    nothing: tuple[Any, ...] = ()
    """Values that ask for nothing: they are taken out in silence, as is any section with `enabled: false`."""


SPEC: Mapping[str, str] = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size and training.micro_batch_size",
    "managed_gradient_accumulation": "training.global_batch_size and training.micro_batch_size",
    "gradient_clipping": "training.clip",
    "bf16": "training.precision",
    "bfloat16": "training.precision",
    "fp16": "training.precision",
    "torch_autocast": "training.precision",
    "data_types": "training.precision",
    "optimizer": "training.learning_rate, betas, epsilon and weight_decay",
    "scheduler": "training.schedule",
}
"""What the spec decides, and where."""

_REMOVED = "DeepSpeed 0.19 has removed it"
_REPORTS = "Tandem measures time, memory, FLOPs and bytes itself (docs/tracking.md); remove it"
_CHECKPOINTS = "Tandem writes its own checkpoints (the spec's `checkpoint` section); remove it"
_DATA = (
    "the order of the rows and their lengths are the spec's (`data`, `task`), and DeepSpeed feeds no rows; remove it"
)
_PARTS = (
    "neither checkpoints, exports nor a change of workers know such parts; ZeRO stage 3 divides the weights instead"
)
_LOGS = "figures go to MLflow, and DeepSpeed's loss is a rank's share times the workers; remove it"

TOP: Mapping[str, Honoured | Refused] = {
    "zero_optimization": Honoured(SECTION),
    "communication_data_type": Honoured(one_of("fp32")),
    "zero_allow_untested_optimizer": Honoured(FLAG),
    "disable_python_gc": Honoured(FLAG),
    "log_level": Honoured(one_of("debug", "info", "warning", "error", "critical")),
    "steps_per_print": Honoured(SIZE, needs_log=True),
    "wall_clock_breakdown": Honoured(FLAG, needs_log=True),
    "zero_force_ds_cpu_optimizer": Refused(
        "the spec's AdamW is torch's, also when it is offloaded; remove it", (False,)
    ),
    "gradient_allreduce_op": Refused(
        "a sum would be as many times too large as there are workers; remove it", ("mean",)
    ),
    "prescale_gradients": Refused("it guards fp16 sums, and no run computes in fp16; remove it", (False,)),
    "gradient_predivide_factor": Refused("it guards fp16 sums, and no run computes in fp16; remove it", (1,)),
    "tensor_parallel": Refused(f"AutoTP cuts layers up: {_PARTS}"),
    "pipeline": Refused(f"a pipeline cuts the model up: {_PARTS}"),
    "expert_parallel": Refused(f"it divides experts over workers: {_PARTS}"),
    "use_data_before_expert_parallelism": Refused("no experts are divided over workers; remove it", (False,)),
    "sequence_parallel_size": Refused("the spec's training.parallel.sequence has workers share rows; remove it", (1,)),
    "data_parallel_size": Refused("it is the number of workers: resources.workers; remove it"),
    "seq_parallel_communication_data_type": Refused("it is for sequence_parallel_size alone; remove it"),
    "data_efficiency": Refused(f"curricula and dropped tokens change what is learned from: {_DATA}"),
    "curriculum_learning": Refused(f"{_REMOVED}; {_DATA}"),
    "progressive_layer_drop": Refused(f"{_REMOVED}; model.config has the architecture's own dropout"),
    "compression_training": Refused(f"{_REMOVED}; phase `quantize` makes a smaller model of a trained one"),
    "quantize_training": Refused(f"{_REMOVED}; phase `quantize` makes a smaller model of a trained one"),
    "weight_quantization": Refused("it is for inference; phase `quantize` makes a smaller model of a trained one"),
    "eigenvalue": Refused(f"{_REMOVED}; remove it"),
    "sparse_attention": Refused(f"{_REMOVED}; model.config decides the attention"),
    "sparse_gradients": Refused(f"{_REMOVED}; remove it", (False,)),
    "graph_harvesting": Refused(f"{_REMOVED}; remove it", (False,)),
    "amp": Refused(f"{_REMOVED}; training.precision decides it"),
    "elasticity": Refused(f"{_REMOVED}; the batch is exact at any number of workers (resources.workers: {{min, max}})"),
    "nebula": Refused(f"{_REMOVED}; {_CHECKPOINTS}"),
    "checkpoint": Refused(_CHECKPOINTS),
    "datastates_ckpt": Refused(_CHECKPOINTS),
    "activation_checkpointing": Refused("it is for DeepSpeed's own layers; training.gradient_checkpointing is meant"),
    "compile": Refused("the spec's training.compile decides it, with DeepCompile at stage 3 on GPUs; remove it"),
    "hybrid_engine": Refused("it generates text while it trains, which no task does; remove it"),
    "autotuning": Refused("it ends the process after a few steps; `tandem jobs plan` and sweeps choose settings"),
    "aio": Refused("it is for offload to NVMe, which a JSON cannot ask for (training.deepspeed.offload); remove it"),
    "dataloader_drop_last": Refused(_DATA, (False,)),
    "disable_allgather": Refused("DeepSpeed reads it and does nothing with it; remove it", (False,)),
    "allgather_size": Refused(
        "it belonged to `zero_optimization: true`; write zero_optimization.allgather_bucket_size"
    ),
    "vocabulary_size": Refused("nothing but a warning comes of it; remove it"),
    "flops_profiler": Refused(_REPORTS),
    "comms_logger": Refused(_REPORTS),
    "timers": Refused(_REPORTS),
    "memory_breakdown": Refused(_REPORTS, (False,)),
    "dump_state": Refused(_REPORTS, (False,)),
    "tensorboard": Refused(_LOGS),
    "wandb": Refused(_LOGS),
    "csv_monitor": Refused(_LOGS),
    "comet": Refused(_LOGS),
}
"""By key of the JSON's first level, but for SPEC."""

_PARTED = (1, 2)
_ANY = (1, 2, 3)
_THREE = (3,)
_QUANTISED = "it rounds what is communicated or kept, which changes what is learned; remove it"
_OLD = "its name is old: write {}"

ZERO: Mapping[str, Honoured | Refused] = {
    "stage": Honoured(Takes(lambda value: type(value) is int and 0 <= value <= 3, "0, 1, 2 or 3")),
    "contiguous_gradients": Honoured(FLAG, _ANY),
    "reduce_scatter": Honoured(FLAG, _ANY),
    "reduce_bucket_size": Honoured(SIZE, _ANY),
    "overlap_comm": Honoured(FLAG, _ANY),
    "allgather_bucket_size": Honoured(SIZE, _PARTED),
    "use_multi_rank_bucket_allreduce": Honoured(FLAG, _PARTED),
    "round_robin_gradients": Honoured(FLAG, _PARTED),
    "parameter_alignment": Honoured(FLAG, _PARTED),
    "ignore_unused_parameters": Honoured(FLAG, (2,)),
    "offload_optimizer": Honoured(SECTION, _ANY),
    "offload_param": Honoured(SECTION, _THREE),
    "sub_group_size": Honoured(SIZE, _THREE),
    "prefetch_bucket_size": Honoured(COUNT, _THREE),
    "param_persistence_threshold": Honoured(COUNT, _THREE),
    "model_persistence_threshold": Honoured(COUNT, _THREE),
    "max_live_parameters": Honoured(COUNT, _THREE),
    "max_reuse_distance": Honoured(COUNT, _THREE),
    "module_granularity_threshold": Honoured(COUNT, _THREE),
    "use_all_reduce_for_fetch_params": Honoured(FLAG, _THREE),
    "allgather_sequential": Honoured(FLAG, _THREE),
    "memory_efficient_linear": Honoured(FLAG, _THREE),
    "log_trace_cache_warnings": Honoured(FLAG, _THREE),
    "enable_sanity_checks": Honoured(FLAG, _THREE),
    "leaf_module": Honoured(SECTION, _THREE),
    "gather_16bit_weights_on_model_save": Refused("every export gathers the weights; remove it", (True, False)),
    "stage3_gather_fp16_weights_on_model_save": Refused("every export gathers the weights; remove it", (True, False)),
    "compute_grad_norm": Refused("without the norm neither clipping nor the watch for NaN works; remove it", (True,)),
    "allgather_partitions": Refused("DeepSpeed 0.19 reads it and does nothing with it; remove it", (True,)),
    "load_from_fp32_weights": Refused(_CHECKPOINTS, (True,)),
    "elastic_checkpoint": Refused(f"{_CHECKPOINTS[:-11]}, which any number of workers reads; remove it", (False,)),
    "pipeline_loading_checkpoint": Refused(_CHECKPOINTS, (False,)),
    "legacy_stage1": Refused("DeepSpeed has removed it; remove it", (False,)),
    "override_module_apply": Refused("Tandem builds no model inside zero.Init, the only place it is for; remove it"),
    "save_muon_momentum_buffer_in_memory": Refused("the optimizer is AdamW, not Muon; remove it", (False,)),
    "zenflow": Refused("ZenFlow keeps state back where no checkpoint sees it; remove it"),
    "zero_hpz_partition_size": Refused("ZeRO++'s second copy of the parts is not made under Tandem; remove it", (1,)),
    "zero_quantized_weights": Refused(_QUANTISED, (False,)),
    "zero_quantized_nontrainable_weights": Refused(_QUANTISED, (False,)),
    "zero_quantized_gradients": Refused(_QUANTISED, (False,)),
    "mics_shard_size": Refused("DeepSpeed 0.19 has removed MiCS; remove it", (-1,)),
    "mics_hierarchical_params_gather": Refused("DeepSpeed 0.19 has removed MiCS; remove it", (False,)),
    "zeropp_loco_param": Refused("DeepSpeed 0.19 has removed it; remove it"),
    "cpu_offload": Refused(_OLD.format('offload_optimizer: {"device": "cpu"}'), (False,)),
    "cpu_offload_param": Refused(_OLD.format('offload_param: {"device": "cpu"}'), (False,)),
    "cpu_offload_use_pin_memory": Refused(_OLD.format("pin_memory inside offload_optimizer or offload_param")),
}
"""By key of `zero_optimization`, without the `stage3_` that seven of them may begin with."""

STAGE3_NAMES = (
    "prefetch_bucket_size",
    "param_persistence_threshold",
    "model_persistence_threshold",
    "max_live_parameters",
    "max_reuse_distance",
    "gather_16bit_weights_on_model_save",
    "module_granularity_threshold",
    "use_all_reduce_for_fetch_params",
    "allgather_sequential",
)
"""Those that DeepSpeed also takes with `stage3_` before them."""

_NVME = "it is for NVMe: training.deepspeed: {zero_stage: 3, offload: nvme, nvme_path: /a/fast/disk} sets it; remove it"
_SUPER = "SuperOffload keeps state where no checkpoint sees it; remove it"

OFFLOAD: Mapping[str, Honoured | Refused] = {
    "device": Honoured(one_of("none", "cpu")),
    "pin_memory": Honoured(FLAG),
    "nvme_path": Refused(_NVME),
    "buffer_count": Refused(_NVME),
    "buffer_size": Refused(_NVME),
    "max_in_cpu": Refused(_NVME),
    "pipeline_read": Refused(_NVME, (False,)),
    "pipeline_write": Refused(_NVME, (False,)),
    "fast_init": Refused(_NVME, (False,)),
    "ratio": Refused("what stays behind has its moments where no checkpoint sees them; remove it", (1,)),
    "super_offload": Refused(_SUPER, (False,)),
    "cpuadam_cores_perc": Refused(_SUPER),
}
"""By key of `offload_optimizer` and `offload_param`."""

LEAF: Mapping[str, Honoured | Refused] = {
    "classes": Honoured(NAMES),
    "names": Honoured(NAMES),
    "name_suffixes": Honoured(NAMES),
}
"""By key of `leaf_module`."""
