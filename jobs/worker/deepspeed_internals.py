"""The only importer of deepspeed, and what Tandem uses of its insides (0.19): import, engine, ZeRO's partitions.

What lies where at which stage is in jobs/worker/zero_layouts.py, in the words of the accessors below.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import compress
from typing import Any, NamedTuple

import torch

from cluster.internals import Internal
from jobs.worker.zero import SUMMED_ALONE, SUMMED_AT_ONCE

ENTRIES = (
    Internal(
        "deepspeed.ops.__compatible_ops__",
        "to say that the C++ extension `deepspeed_shm_comm` is not there; only inference collectives use it. It is set "
        "whole, since the first look at it tries every extension with the compiler (0.3 s)",
        "the first job of a machine waits for a compiler, or fails for want of one",
        "DeepSpeed builds that extension when a collective asks for it",
    ),
    Internal(
        "deepspeed.runtime.bf16_optimizer.see_memory_usage",
        "replaced by nothing: BF16_Optimizer calls it at every stage of its construction, without a switch",
        "each start of a worker spends 3 s in garbage collection and prints memory reports",
        "it has a switch, as ZeRO's other optimizers do",
    ),
    Internal(
        "deepspeed's import of mlflow and of decorators by torch.compile",
        "both are kept away while deepspeed is imported: the autotuner's mlflow (1.4 s), Muon's TorchInductor (5 s)",
        "each start of a worker takes 6 s more",
        "deepspeed imports the autotuner and Muon where they are used",
    ),
    Internal(
        "DeepSpeedEngine.clip_fp32_gradients",
        "replaced by one that keeps the norm: without ZeRO, DeepSpeed forgets the norm it clips by",
        "`gradient_norm` is NaN at stage 0",
        "`get_global_grad_norm` answers at stage 0",
    ),
    Internal(
        "DeepSpeedEngine.allreduce_no_retain, allreduce_bucket",
        "replaced by one that sums large gradients where they lie: DeepSpeed copies all behind each other, and back",
        "without ZeRO, and at stage 1 in bf16, a step on CPUs takes up to a sixth longer",
        "it copies only what is small",
    ),
    Internal(
        "DeepSpeedEngine._zero3_consolidated_16bit_state_dict",
        "to export the weights of a model in parts; the public `save_16bit_model` writes a pickle",
        "no model can be exported at stage 3",
        "DeepSpeed offers the consolidated weights in memory or as safetensors",
    ),
    Internal(
        "BF16_Optimizer.fp32_groups_flat_partition",
        "the fp32 master weights of this rank, which checkpoints hold: stage 1 in bf16",
        "no checkpoint can be written or read at stage 1 in bf16",
        "DeepSpeed can read and write universal checkpoints without the conversion between two formats",
    ),
    Internal(
        "DeepSpeedZeroOptimizer.single_partition_of_fp32_groups",
        "the fp32 master weights of this rank: stage 2, and stage 1 in fp32",
        "no checkpoint can be written or read at stages 1 and 2",
        "as for fp32_groups_flat_partition",
    ),
    Internal(
        "Parameter._hp_mapping (deepspeed.utils.tensor_fragment)",
        "which elements of a parameter lie where in that partition, at stages 1 and 2",
        "no checkpoint can be written or read at stages 1 and 2",
        "`safe_get_full_fp32_param` and its like have a form for this rank's part and its place",
    ),
    Internal(
        "DeepSpeedZeroOptimizer_Stage3.fp32_partitioned_groups_flat, grad_position, get_param_id",
        "the fp32 master weights of this rank, and where each parameter's part lies in them: stage 3",
        "no checkpoint can be written or read at stage 3",
        "`safe_get_local_fp32_param` tells the part's place as well as its content",
    ),
    Internal(
        "DeepSpeedZeroOptimizer_Stage3.fp16_partitioned_groups_flat",
        "the weights of this rank, which fp32 masters are made to share: DeepSpeed copies them",
        "in fp32, stage 3 takes 20 bytes a parameter instead of 16",
        "it compares devices with devices in `_create_fp32_partitions`",
    ),
    Internal(
        "DeepSpeedZeroOptimizer.parallel_partitioned_bit16_groups, bit16_groups, real_dp_process_group; hp_fragment",
        "the weights that this rank updates at stages 1 and 2, which fp32 masters are made to share: they are a copy",
        "in fp32, stages 1 and 2 take 4 bytes a parameter more, over the ranks",
        "it makes no copy of what is in fp32 already",
    ),
    Internal(
        "deepspeed.runtime.zero.stage_1_and_2._flatten_dense_tensors, bf16_optimizer._flatten_dense_tensors; "
        "optimizer.flatten",
        "while an engine is made, replaced by one that leaves weights where they are if they lie behind each other",
        "at stages 1 and 2 every rank has its weights twice while it begins",
        "it looks where they lie, or is given them flat",
    ),
    Internal(
        "deepspeed.runtime.swap_tensor.partitioned_optimizer_swapper.swap_in_tensors",
        "replaced by one that fills buffers with NaN before they are read into: DeepSpeed's aio looks at no result",
        "a swap file that cannot be read leaves what was in the buffer, and the model learns from that in silence",
        "deepspeed_aio_common.cpp looks at the results of `io_getevents`",
    ),
    Internal(
        "zero.Init._convert_to_deepspeed_param, _aligned_size; free_param; PartitionedParamStatus",
        "to make parameters of stage 3 in parts from the beginning, which Init makes of whole ones",
        "no job can begin at stage 3",
        "zero.Init takes a function that fills in a part",
    ),
    Internal(
        "DeepSpeedZeroOptimizer_Stage3.parameter_offload.partition_all_parameters",
        "to take back what a pass at stage 3 was about to gather: no optimizer step does so after an evaluation",
        "the export fails at a parameter in flight, and the group starts again",
        "GatheredParameters waits for what is in flight",
    ),
    Internal(
        "Parameter.ds_numel, Parameter.ds_tensor (deepspeed.zero.Init)",
        "the whole size of a parameter of which this rank holds a part",
        "the last, padded part of each parameter would be taken to be whole at stage 3",
        "as for grad_position",
    ),
)


Plain = Callable[[Sequence[torch.Tensor]], torch.Tensor]
"""Tensors of any shapes → one with their elements behind each other, (N,)."""


class Place(NamedTuple):
    """A run of a flattened parameter in one of the optimizer's flat tensors."""

    flat: torch.Tensor
    start: int
    """First element in the parameter."""
    offset: int
    """Its place in the flat tensor."""
    numel: int


def import_deepspeed() -> Any:
    """Import deepspeed without what costs a job's start and is not used: mlflow, TorchInductor, memory reports."""
    with _without_mlflow(), _without_compiler():
        import deepspeed
        import deepspeed.runtime.bf16_optimizer
        import deepspeed.runtime.zero.muon.muon_optimizer
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}  # set whole: reading it runs the compiler
    deepspeed.runtime.bf16_optimizer.see_memory_usage = lambda *arguments, **keywords: None
    return deepspeed


def initialize(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    config: dict[str, Any],
    flatten: Callable[[Plain, Sequence[torch.Tensor]], torch.Tensor],
) -> Any:
    """Return an engine, whose groups of weights, at stages 1 and 2, are put behind each other by `flatten`.

    Args:
        flatten: given DeepSpeed's own way to do so, which copies, and the weights of any shapes; returns them as (N,).
    """
    from deepspeed.runtime import bf16_optimizer
    from deepspeed.runtime.zero import stage_1_and_2

    modules = (bf16_optimizer, stage_1_and_2)
    plain: list[Plain] = [module._flatten_dense_tensors for module in modules]
    for module, theirs in zip(modules, plain, strict=True):
        module._flatten_dense_tensors = partial(flatten, theirs)
    try:
        engine, *_ = import_deepspeed().initialize(
            model=model, optimizer=optimizer, config=config, dist_init_required=False
        )
    finally:
        for module, theirs in zip(modules, plain, strict=True):
            module._flatten_dense_tensors = theirs
    for module, theirs in zip(modules, plain, strict=True):
        if module.__name__ == type(engine.optimizer).__module__:
            engine.optimizer.flatten = theirs  # what it flattens from now on are gradients
    return engine


def replace_clipping(engine: Any, clip: Callable[[], None]) -> None:
    """Have an engine without ZeRO clip its gradients by `clip`."""
    engine.clip_fp32_gradients = clip


def reduce_in_place(engine: Any) -> None:
    """Have an engine sum large gradients over the ranks where they lie, as far as it is the engine that sums them.

    That is without ZeRO, where there is one a parameter, and at stage 1 in bf16: one a group of parameters, in fp32,
    which is sent in bf16 and so copied for that.
    """
    plain = engine.allreduce_no_retain

    def reduce(bucket: Sequence[torch.Tensor], dp_group: Any, dp_world_size: Any = None, **others: Any) -> None:
        # By size alone: it is the same on all ranks, as strides need not be.
        large = [gradient.numel() >= SUMMED_ALONE for gradient in bucket]
        for gradient in compress(bucket, large):
            flat = gradient.reshape(-1)  # a view but of one that is not contiguous
            for piece in flat.split(SUMMED_AT_ONCE):
                engine.allreduce_bucket([piece], dp_group, dp_world_size)
            if not gradient.is_contiguous():
                gradient.copy_(flat.view_as(gradient))
        if small := [gradient for gradient, alone in zip(bucket, large, strict=True) if not alone]:
            plain(small, dp_group, dp_world_size=dp_world_size, **others)

    engine.allreduce_no_retain = reduce


def consolidated_weights(engine: Any) -> dict[str, torch.Tensor] | None:
    """Return all weights of stage 3, each in its whole shape, on the CPU at rank 0, None elsewhere. Collective."""
    return engine._zero3_consolidated_16bit_state_dict()


def bf16_partitions(optimizer: Any) -> Sequence[torch.Tensor]:
    """Return this rank's partition [elements / world size], fp32, of each group: BF16_Optimizer."""
    return optimizer.fp32_groups_flat_partition


def fp32_partitions(optimizer: Any) -> Sequence[torch.Tensor]:
    """Return this rank's partition [elements / world size], fp32, of each group: DeepSpeedZeroOptimizer."""
    return optimizer.single_partition_of_fp32_groups


def place_in_group(parameter: Any, partitions: Sequence[torch.Tensor]) -> Place | None:
    """Return what this rank holds of a parameter at stages 1 and 2: the group, [elements], is in equal parts."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    where, lies = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Place(partitions[mapping.param_group_index], where.start, lies.start, where.numel)


def place_in_parts(parameter: Any, optimizer: Any, rank: int) -> Place | None:
    """Return what this rank holds of a parameter at stage 3: each one is in equal parts, the last of them padded."""
    group, offset, part = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = rank * part
    numel = min(part, parameter.ds_numel - start)
    return Place(optimizer.fp32_partitioned_groups_flat[group], start, offset, numel) if numel > 0 else None


def flat_of_parts(parameter: Any, optimizer: Any) -> torch.Tensor:
    """Return the fp32 master weights (N,) among which a parameter's part lies at stage 3, as on every other rank."""
    group, *_ = optimizer.grad_position[optimizer.get_param_id(parameter)]
    return optimizer.fp32_partitioned_groups_flat[group]  # type: ignore[no-any-return]


def share_masters(optimizer: Any, stage: int) -> None:
    """Have the fp32 master weights be the weights, where these are fp32 too: DeepSpeed copies them.

    At stage 3 it means not to, and compares a tensor's device with a text, which is never equal. At stages 1 and 2 it
    copies masters to weights after a step, which then is nothing.
    """
    if stage == 3:
        both = zip(optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat, strict=True)
        for weights, masters in both:
            _share(weights, masters)
    elif hasattr(optimizer, "parallel_partitioned_bit16_groups"):
        for index, masters in enumerate(fp32_partitions(optimizer)):
            rank = torch.distributed.get_rank(optimizer.real_dp_process_group[index])
            if _share(optimizer.parallel_partitioned_bit16_groups[index][rank], masters):
                _point_to(masters, optimizer.bit16_groups[index])


def _share(weights: torch.Tensor | None, masters: torch.Tensor) -> bool:
    """Have two tensors (N,) be one, unless they are of other types (bf16), or elsewhere (offloaded from a GPU)."""
    if weights is None or (weights.dtype, weights.device) != (masters.dtype, masters.device):
        return False
    if weights.shape != masters.shape:  # masters on NVMe are empty here
        return False
    masters.data = weights.data
    return True


def _point_to(masters: torch.Tensor, parameters: Sequence[Any]) -> None:
    """Have parameters know their run of the masters (N,), of which they keep the old one else."""
    for mapping in (each._hp_mapping for each in parameters):
        if mapping is not None:
            place = mapping.hp_fragment_address
            mapping.hp_fragment = masters.detach().narrow(0, place.start, place.numel)


def load_async_io() -> bool:
    """Build what reads and writes swap files, or load it; False where the library or a compiler is not there."""
    import_deepspeed()
    from deepspeed.ops.op_builder import AsyncIOBuilder

    builder = AsyncIOBuilder()
    if not builder.is_compatible():
        return False
    builder.load(verbose=False)
    _show_failed_reads()
    return True


def _show_failed_reads() -> None:
    """Have what is read from swap files be NaN where nothing was read: a loss or gradient that is NaN ends the run."""
    from deepspeed.runtime.swap_tensor import partitioned_optimizer_swapper, utils

    def swap_in(handle: Any, buffers: Sequence[torch.Tensor], paths: Sequence[str]) -> None:
        for buffer in buffers:
            buffer.fill_(torch.nan)
        utils.swap_in_tensors(handle, buffers, paths)

    partitioned_optimizer_swapper.swap_in_tensors = swap_in


def whole_numel(parameter: Any) -> int:
    """Return the elements of a parameter that is in parts (stage 3)."""
    return int(parameter.ds_numel)


def partitioner(config: dict[str, Any], dtype: torch.dtype, files: Any) -> Any:
    """Return what divides parameters at stage 3, as a configuration says; `files`: for parameters on NVMe, or None."""
    nothing = torch.nn.Module()
    return import_deepspeed().zero.Init(nothing, config_dict_or_path=config, dtype=dtype, param_swapper=files)


def in_parts(
    init: Any, like: torch.nn.Parameter, dtype: torch.dtype, fill: Callable[[int, torch.Tensor], None]
) -> torch.nn.Parameter:
    """Return a parameter of stage 3 of which this rank has its part; no rank has ever had it whole.

    Args:
        init: as `partitioner` makes it.
        like: its shape, and whether it is trained.
        fill: called with the first element of this rank's part and where it goes, 1-D.
    """
    from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus, free_param

    nothing = torch.empty(1, dtype=dtype, device=init.local_device)
    parameter = torch.nn.Parameter(nothing.expand(like.shape) if like.dim() else nothing[0], like.requires_grad)
    vars(parameter).update(vars(like))
    init._convert_to_deepspeed_param(parameter)
    aligned = init._aligned_size(parameter)
    size = aligned // parameter.ds_zero_partition_world_size
    remote = init.remote_device if init.param_swapper is None else "cpu"
    device = init.local_device if parameter.ds_persist else remote
    part = torch.zeros(size, dtype=dtype, device=device)
    start = size * parameter.ds_zero_partition_rank
    fill(start, part[: max(0, min(size, parameter.ds_numel - start))])
    if init.pin_memory and part.device.type == "cpu" and torch.cuda.is_available():  # the setting is on by default
        part = part.pin_memory()
    part.ds_numel, part.status, part.final_location = size, PartitionedParamStatus.AVAILABLE, None
    parameter.ds_tensor, parameter.ds_numel_aligned = part, aligned
    free_param(parameter)
    if init.param_swapper is not None:
        init.param_swapper.take(parameter)
    return parameter


def is_in_parts(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor of any shape is a parameter of stage 3, of which this rank has its part."""
    return hasattr(tensor, "ds_tensor")


def take_back(engine: Any) -> None:
    """Have each rank keep its parts alone of a model at stage 3, whatever its last pass gathered ahead. Collective."""
    engine.optimizer.parameter_offload.partition_all_parameters()


def gathered(parameters: Sequence[torch.Tensor]) -> AbstractContextManager[None]:
    """Return a context in which every rank has these parameters of stage 3, of any shapes, whole. Collective."""
    return import_deepspeed().zero.GatheredParameters(list(parameters)) if parameters else nullcontext()


def part(tensor: Any) -> tuple[int, torch.Tensor]:
    """Return the first element of this rank's part of a tensor of any shape, and the part, (N,); or all of it."""
    if not is_in_parts(tensor):
        return 0, tensor.detach().reshape(-1)
    start = tensor.ds_tensor.ds_numel * tensor.ds_zero_partition_rank
    away = tensor.ds_tensor.numel() < tensor.ds_tensor.ds_numel
    mine = tensor.nvme_swapper.read(tensor) if away else tensor.ds_tensor.detach().view(-1)
    return start, mine[: max(0, tensor.ds_numel - start)]


def for_reading(model: torch.nn.Module, config: dict[str, Any]) -> torch.nn.Module:
    """Return a model whose parameters are in parts as one that gathers them in its forward passes. Collective."""
    engine, *_ = import_deepspeed().initialize(model=model, config=config, dist_init_required=False)
    return engine  # type: ignore[no-any-return]


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
