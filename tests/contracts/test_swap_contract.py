"""DeepSpeed still has what jobs/worker/swap_internals.py relies on.

What lies in the files is tested on real ones in tests/integration/test_jobs_nvme.py.
"""

import pytest

from jobs.worker import deepspeed_internals, swap_internals
from tests.support.contracts import Contract, has_attributes, source_mentions

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


@pytest.mark.parametrize("name", SWAP.entries)
def test_swap(name: str) -> None:
    SWAP.verify(name)
