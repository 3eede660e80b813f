"""What optimizer states on NVMe take of DeepSpeed's insides (0.19): the files in which they lie, and their beginning.

deepspeed itself is imported in jobs/worker/deepspeed_internals.py alone; these are objects that it has made.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cluster.internals import Internal

ENTRIES = (
    Internal(
        "OptimizerSwapper.swap_params_info; DeepSpeedZeroOptimizer_Stage3._swappable_optimizer_subgroup and its swaps",
        "the files in which masters and moments lie that are offloaded to NVMe, and the moments' beginning",
        "no checkpoint can be written or read with offload: nvme",
        "`safe_get_local_fp32_param` and its like work without reading a sub-group for each parameter",
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
