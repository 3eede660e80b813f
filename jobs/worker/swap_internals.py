"""What offload to NVMe takes of DeepSpeed's insides (0.19).

Of optimizer states: the files in which they lie, and their beginning. Of parameters: files of our own, which it reads
and writes through an object in the place of its own swapper. Why not that one: docs/decisions.md.

deepspeed itself is imported in jobs/worker/deepspeed_internals.py alone; these are objects that it has made.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from cluster.internals import Internal
from jobs.worker import parameter_files
from jobs.worker.zero import PERSISTENT

ENTRIES = (
    Internal(
        "OptimizerSwapper.swap_params_info; DeepSpeedZeroOptimizer_Stage3._swappable_optimizer_subgroup and its swaps",
        "the files in which masters and moments lie that are offloaded to NVMe, and the moments' beginning",
        "no checkpoint can be written or read with offload: nvme",
        "`safe_get_local_fp32_param` and its like work without reading a sub-group for each parameter",
    ),
    Internal(
        "zero.Init(param_swapper=…), Parameter.nvme_swapper; Parameter.ds_id, ds_tensor.final_location",
        "DeepSpeed reads and writes parameters on NVMe by calling the methods of an object that it is given",
        "no job can have its parameters on NVMe",
        "DeepSpeed's own swapper looks at what it has read, reads ahead without failing, and needs no count of buffers",
    ),
)


def begin_moments(optimizer: Any, begin: Callable[[torch.Tensor], object]) -> None:
    """Have moments of the sub-groups on NVMe lie there too, which DeepSpeed leaves to the first step.

    Args:
        optimizer: of stage 3; without offload to NVMe nothing happens.
        begin: called with each such sub-group's masters, (N,) fp32, while they are in memory; it makes their state.
    """
    for group, masters in enumerate(optimizer.fp32_partitioned_groups_flat):
        if optimizer._swappable_optimizer_subgroup(group):
            optimizer._optimizer_states_and_gradient_swap_in(group)
            begin(masters)
            optimizer._optimizer_states_and_gradient_swap_out(group)


def swap_files(optimizer: Any, masters: Any) -> tuple[list[Path], int]:
    """Return the files of a sub-group on NVMe: masters, then states in their order; and the elements of each.

    No files: it is in memory.
    """
    swapper = getattr(optimizer, "optimizer_swapper", None)
    found = swapper.swap_params_info.get(masters.ds_id) if swapper is not None else None
    return ([Path(path) for path in found.get_swap_paths()], found.numel()) if found is not None else ([], 0)


def files_of(config: dict[str, Any]) -> ParameterFiles | None:
    """Return new files for the parameters of a model, None where a configuration wants them in memory."""
    offload = config["zero_optimization"].get("offload_param") or {}
    return ParameterFiles(Path(offload["nvme_path"])) if offload.get("device") == "nvme" else None


class ParameterFiles:
    """The files of one model's parameters on one rank, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        """Make a folder in `folder`, which goes with that one; the model that is read at the end has its own."""
        self._folder = Path(tempfile.mkdtemp(prefix="parameters-", dir=folder))

    def take(self, parameter: Any) -> None:
        """Put a parameter's part (N,), which is in memory, into a file, unless it may stay gathered."""
        if parameter.ds_numel > PERSISTENT:
            parameter.ds_tensor.final_location = "nvme"
            self.swap_out_and_release([parameter])

    def read(self, parameter: Any) -> torch.Tensor:
        """Return a parameter's part, (N,): a tensor of its own.

        Raises:
            OSError: its file cannot be read, or is too short.
        """
        part = torch.empty(parameter.ds_tensor.ds_numel, dtype=parameter.ds_tensor.dtype)
        parameter_files.read(self._path(parameter), part)
        return part

    def swap_in(self, parameters: Sequence[Any], async_op: bool = True) -> None:
        """Have parts be in memory; they are when this returns, whatever is asked."""
        for parameter in parameters:
            part = parameter.ds_tensor
            part.data = self.read(parameter)
            part.status = type(part.status).AVAILABLE

    def remove_partition_and_release_buffers(self, parameters: Sequence[Any]) -> None:
        """Have parts be in their files alone."""
        for parameter in parameters:
            part = parameter.ds_tensor
            part.data = torch.empty(0, dtype=part.dtype)
            part.status = type(part.status).NOT_AVAILABLE

    def swap_out_and_release(self, parameters: Sequence[Any]) -> None:
        """Write parts as they are in memory, and have them be in their files alone."""
        for parameter in parameters:
            parameter_files.write(self._path(parameter), parameter.ds_tensor)
        self.remove_partition_and_release_buffers(parameters)

    def swap_out_partitioned_params(
        self, dst_fp16_params: Sequence[Any], src_fp32_params: Sequence[torch.Tensor]
    ) -> None:
        """Write what the optimizer has made of parts that are in files: its masters (N,), rounded as the parts are."""
        for parameter, masters in zip(dst_fp16_params, src_fp32_params, strict=True):
            parameter_files.write(self._path(parameter), masters.detach().to("cpu", parameter.ds_tensor.dtype))

    def available_swap_in_buffers(self) -> int:
        """Say that nothing is to be read ahead: a part in flight while the optimizer writes it would come back old."""
        return 0

    def reserve_partitioned_swap_space(self, partition_num_elems: Sequence[int]) -> None:
        """Reserve nothing: what is written needs no buffer."""

    def _path(self, parameter: Any) -> Path:
        return self._folder / str(parameter.ds_id)
