"""DeepSpeed still has what jobs/worker/trial_internals.py relies on.

That training afterwards is the same is tested on real engines in tests/integration/test_jobs_trial.py.
"""

import pytest

from jobs.worker import deepspeed_internals, trial_internals
from tests.support.contracts import Contract, calls, has_attributes, source_mentions

TRIAL = Contract("jobs/worker/trial_internals.py", trial_internals.ENTRIES)
STAGES_1_AND_2 = "deepspeed.runtime.zero.stage_1_and_2"


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    deepspeed_internals.import_deepspeed()


@TRIAL.check("DeepSpeedEngine.micro_steps")
def _last() -> None:
    from deepspeed.runtime.engine import DeepSpeedEngine

    boundary = "return (self.micro_steps + 1) % self.gradient_accumulation_steps() == 0"
    calls(DeepSpeedEngine.is_gradient_accumulation_boundary, boundary)


@TRIAL.check("DeepSpeedZeroOptimizer.averaged_gradients, all_grad_tensors, micro_step_id")
def _thrown_away() -> None:
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    skipped = ("self.averaged_gradients[k] = None", "self.all_grad_tensors[k] = None")
    calls(DeepSpeedZeroOptimizer.step, "self.micro_step_id = INITIAL_MICRO_STEP_ID", *skipped)
    source_mentions(STAGES_1_AND_2, "INITIAL_MICRO_STEP_ID = -1")
    calls(DeepSpeedZeroOptimizer_Stage3, "self.micro_step_id = 0", "self._epilogue_ran_this_backward = False")
    calls(BF16_Optimizer.zero_grad, "set_to_none=True", "self.clear_lp_grads(set_to_none)", "self.clear_hp_grads()")


@TRIAL.check("DeepSpeedZeroOptimizer.gradient_accumulation_steps")
def _accumulation() -> None:
    from deepspeed.runtime.engine import DeepSpeedEngine

    calls(DeepSpeedEngine.set_train_batch_size, "self._config.gradient_accumulation_steps = new_gas")
    has_attributes(DeepSpeedEngine, "set_train_micro_batch_size", "gradient_accumulation_steps")
    source_mentions(STAGES_1_AND_2, "self.gradient_accumulation_steps = gradient_accumulation_steps")


@pytest.mark.parametrize("name", TRIAL.entries)
def test_trial(name: str) -> None:
    TRIAL.verify(name)
