"""DeepSpeed still has what jobs/worker/swap_internals.py relies on.

What lies in the files is tested on real ones in tests/integration/test_jobs_nvme.py.
"""

import re

import pytest

from jobs.worker import deepspeed_internals, swap_internals
from tests.support.contracts import Contract, has_attributes, source_mentions, source_of

SWAP = Contract("jobs/worker/swap_internals.py", swap_internals.ENTRIES)


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    deepspeed_internals.import_deepspeed()


@SWAP.check(
    "OptimizerSwapper.swap_params_info; DeepSpeedZeroOptimizer_Stage3._swappable_optimizer_subgroup and its swaps"
)
def _swaps() -> None:
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    name = "_optimizer_states_and_gradient_swap"
    has_attributes(DeepSpeedZeroOptimizer_Stage3, "_swappable_optimizer_subgroup", f"{name}_in", f"{name}_out")
    source_mentions(
        "deepspeed.runtime.swap_tensor.optimizer_utils",
        "self.swap_params_info[param_id] = OptimizerStateSwapInfo(", "def get_swap_paths(self):",
        "swap_info.add_state_tensors(state_tensors)", "for state_name, value in self.optimizer.state[parameter]",
    )  # fmt: skip


@SWAP.check("zero.Init(param_swapper=…), Parameter.nvme_swapper; Parameter.ds_id, ds_tensor.final_location")
def _files() -> None:
    """A method of theirs that nobody has looked at here would be called on our object, and fail late."""
    called = set()
    for name in ("partition_parameters", "stage3", "partitioned_param_coordinator", "parameter_offload"):
        called |= set(re.findall(r"(?:nvme|param)_swapper\.(\w+)\(", source_of(f"deepspeed.runtime.zero.{name}")))
    ours = {name for name in vars(swap_internals.ParameterFiles) if not name.startswith("_")} - {"take", "read"}
    of_what_is_in_memory_or_asked_for = {
        "swappable_tensor", "get_buffer", "swap_into_buffer",  # made by zero.Init, or kept in memory (max_in_cpu)
        "get_path", "reserve_available_buffers", "release_reserved_buffers",  # fast_init
        "synchronize_reads",  # read ahead
    }  # fmt: skip
    assert called == ours | of_what_is_in_memory_or_asked_for
    source_mentions(
        "deepspeed.runtime.zero.partition_parameters", "self.param_swapper = param_swapper or ",
        "param.nvme_swapper = self.param_swapper", "param.ds_tensor.final_location == OffloadDeviceEnum.nvme",
    )  # fmt: skip


@pytest.mark.parametrize("name", SWAP.entries)
def test_swap(name: str) -> None:
    SWAP.verify(name)
