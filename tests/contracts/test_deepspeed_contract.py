"""DeepSpeed still has what jobs/worker/deepspeed_internals.py relies on.

What lies where is tested on real engines in tests/integration/test_jobs_zero_layouts.py.
"""

import importlib
import subprocess
import sys
from typing import Any, ClassVar

import pytest
import torch

from jobs.worker import deepspeed_internals, zero_layouts
from jobs.worker.deepspeed_keys import LEAF, OFFLOAD, SPEC, STAGE3_NAMES, TOP, ZERO
from tests.support.contracts import Contract, calls, has_attributes, source_mentions

DEEPSPEED = Contract("jobs/worker/deepspeed_internals.py", deepspeed_internals.ENTRIES)
OPTIMIZERS = {
    "AdamW": "torch.optim",
    "MuonAndAdamW": "jobs.worker.muon",
    "BF16_Optimizer": "deepspeed.runtime.bf16_optimizer",
    "DeepSpeedZeroOptimizer": "deepspeed.runtime.zero.stage_1_and_2",
    "DeepSpeedZeroOptimizer_Stage3": "deepspeed.runtime.zero.stage3",
}


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    deepspeed_internals.import_deepspeed()


def optimizer(name: str) -> type:
    found: type = getattr(importlib.import_module(OPTIMIZERS[name]), name)
    return found


@DEEPSPEED.check("deepspeed.ops.__compatible_ops__")
def _ops() -> None:
    import deepspeed

    assert deepspeed.ops.__compatible_ops__ == {"deepspeed_shm_comm": False}
    source_mentions("deepspeed.comm.torch", "not deepspeed.ops.__compatible_ops__.get(builder.NAME, False):")
    source_mentions("deepspeed.ops.op_builder.cpu.comm", 'NAME = "deepspeed_shm_comm"')


@DEEPSPEED.check("deepspeed.runtime.bf16_optimizer.see_memory_usage")
def _memory() -> None:
    source_mentions("deepspeed.runtime.bf16_optimizer", " see_memory_usage,", "see_memory_usage('")


@DEEPSPEED.check("deepspeed's import of mlflow and of decorators by torch.compile")
def _imports() -> None:
    code = (
        "import sys; from jobs.worker.deepspeed_internals import import_deepspeed; import_deepspeed();"
        "import torch; assert torch.compile.__module__.startswith('torch');"
        "print('loaded:', *({'mlflow', 'torch._inductor.compile_fx'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded:", done.stdout


@DEEPSPEED.check("DeepSpeedEngine.clip_fp32_gradients")
def _clip() -> None:
    from deepspeed.runtime.engine import DeepSpeedEngine

    calls(DeepSpeedEngine._take_model_step, "self.clip_fp32_gradients()")
    has_attributes(DeepSpeedEngine, "get_global_grad_norm", "zero_optimization_stage")


@DEEPSPEED.check("DeepSpeedEngine.allreduce_no_retain, allreduce_bucket")
def _sums() -> None:
    from deepspeed.runtime.engine import DeepSpeedEngine

    calls(DeepSpeedEngine._reduce_non_expert_gradients, "self.allreduce_no_retain(dense_bucket,")
    calls(DeepSpeedEngine.allreduce_bucket, "tensor = self.flatten(bucket)", "tensor.copy_(tensor_to_allreduce)")
    alone = torch.arange(4.0).reshape(2, 2)
    assert torch._utils._flatten_dense_tensors([alone]).data_ptr() == alone.data_ptr()


@DEEPSPEED.check("DeepSpeedEngine._zero3_consolidated_16bit_state_dict")
def _consolidated() -> None:
    from deepspeed.runtime.engine import DeepSpeedEngine

    has_attributes(DeepSpeedEngine, "_zero3_consolidated_16bit_state_dict", "zero_optimization_partition_weights")


@DEEPSPEED.check("BF16_Optimizer.fp32_groups_flat_partition")
def _bf16() -> None:
    calls(optimizer("BF16_Optimizer"), "self.fp32_groups_flat_partition.append(", "link_hp_params(")


@DEEPSPEED.check("DeepSpeedZeroOptimizer.single_partition_of_fp32_groups")
def _fp32() -> None:
    calls(optimizer("DeepSpeedZeroOptimizer"), "self.single_partition_of_fp32_groups.append(", "link_hp_params(")


@DEEPSPEED.check("Parameter._hp_mapping (deepspeed.utils.tensor_fragment)")
def _mapping() -> None:
    from deepspeed.utils import mixed_precision_linkage

    tensor_fragment = importlib.import_module("deepspeed.utils.tensor_fragment")  # the package has a class of that name
    fields = {"lp_fragment_address", "hp_fragment_address", "param_group_index"}
    assert fields <= tensor_fragment.tensor_fragment.__dataclass_fields__.keys()
    assert {"numel", "start"} <= tensor_fragment.fragment_address.__dataclass_fields__.keys()
    calls(mixed_precision_linkage.link_hp_params, "lp_param._hp_mapping = ")


@DEEPSPEED.check("DeepSpeedZeroOptimizer_Stage3.fp32_partitioned_groups_flat, grad_position, get_param_id")
def _stage3() -> None:
    stage3 = optimizer("DeepSpeedZeroOptimizer_Stage3")
    has_attributes(stage3, "get_param_id")
    place = "self.grad_position[param_id] = [int(i), int(current_offset), int(num_elements)]"
    calls(stage3.set_grad_positions, "param.partition_numel()", place)
    calls(stage3, "self.fp32_partitioned_groups_flat.append(")


@DEEPSPEED.check("DeepSpeedZeroOptimizer_Stage3.fp16_partitioned_groups_flat")
def _weights() -> None:
    stage3 = optimizer("DeepSpeedZeroOptimizer_Stage3")
    calls(
        stage3,
        "self.fp16_partitioned_groups_flat.append(",
        "self.fp16_partitioned_groups_flat[sub_group_id].data.copy_(",
    )


@DEEPSPEED.check(
    "DeepSpeedZeroOptimizer.parallel_partitioned_bit16_groups, bit16_groups, real_dp_process_group; hp_fragment"
)
def _partitions() -> None:
    calls(
        optimizer("DeepSpeedZeroOptimizer"),
        "self.parallel_partitioned_bit16_groups.append(",
        "self.bit16_groups.append(",
        "bit16_partitions[partition_id].data.copy_(fp32_partition.data)",
        "dist.get_rank(group=self.real_dp_process_group[i])",
    )
    tensor_fragment = importlib.import_module("deepspeed.utils.tensor_fragment")
    assert "hp_fragment" in tensor_fragment.tensor_fragment.__dataclass_fields__


@DEEPSPEED.check("DeepSpeedZeroOptimizer_Stage3.parameter_offload.partition_all_parameters")
def _taken_back() -> None:
    calls(optimizer("DeepSpeedZeroOptimizer_Stage3"), "self.parameter_offload.partition_all_parameters()")


@DEEPSPEED.check(
    "deepspeed.runtime.zero.stage_1_and_2._flatten_dense_tensors, bf16_optimizer._flatten_dense_tensors; "
    "optimizer.flatten"
)
def _flatten() -> None:
    calls(optimizer("BF16_Optimizer"), "self.flatten = _flatten_dense_tensors", "align_dense_tensors(")
    calls(optimizer("DeepSpeedZeroOptimizer"), "self.flatten = _flatten_dense_tensors", "align_dense_tensors(")


@DEEPSPEED.check("deepspeed.runtime.swap_tensor.partitioned_optimizer_swapper.swap_in_tensors")
def _reads() -> None:
    module = "deepspeed.runtime.swap_tensor.partitioned_optimizer_swapper"
    source_mentions(module, "swap_in_tensors(aio_handle, swap_buffers, swap_info.get_swap_paths())")
    source_mentions(module, "swap_in_tensors(aio_handle, swap_buffers, swap_paths)")


@DEEPSPEED.check("zero.Init._convert_to_deepspeed_param, _aligned_size; free_param; PartitionedParamStatus")
def _init() -> None:
    partition = importlib.import_module("deepspeed.runtime.zero.partition_parameters")
    has_attributes(partition.Init, "_convert_to_deepspeed_param", "_aligned_size", "_partition_param")
    source_mentions(
        "deepspeed.runtime.zero.partition_parameters",
        "param.ds_tensor.ds_numel = ", "param.ds_tensor.status = PartitionedParamStatus.AVAILABLE",
        "param.ds_tensor.final_location = ", "param.ds_numel_aligned = ", "free_param(param)", "param.ds_persist = ",
        "self.remote_device", "ds_zero_partition_rank",
    )  # fmt: skip


@DEEPSPEED.check("Parameter.ds_numel, Parameter.ds_tensor (deepspeed.zero.Init)")
def _parts() -> None:
    source_mentions("deepspeed.runtime.zero.partition_parameters", "param.ds_numel = ", "param.ds_tensor = ")


@pytest.mark.parametrize("name", DEEPSPEED.entries)
def test_deepspeed(name: str) -> None:
    DEEPSPEED.verify(name)


def test_every_known_layout_is_that_of_a_class_which_exists() -> None:
    assert {name for _, name in zero_layouts.LAYOUTS} == OPTIMIZERS.keys()
    for name in OPTIMIZERS:
        assert optimizer(name).__name__ == name


class Watched(dict):
    """A configuration that notes which of its keys are asked for."""

    asked: ClassVar[set[str]] = set()

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """Return what is at a key, as dict does."""
        self.asked.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        """Return itself: code asks whether a key is in it."""
        return self


def test_every_key_that_deepspeed_asks_for_has_a_rule() -> None:
    config = importlib.import_module("deepspeed.runtime.config")
    config.DeepSpeedConfig(Watched(train_micro_batch_size_per_gpu=1))
    own = {key for key in Watched.asked if key.islower()}
    assert {"zero_optimization", "optimizer", "communication_data_type", "tensor_parallel"} <= own
    assert own | config._REMOVED_TOP_LEVEL_CONFIG_KEYS.keys() <= TOP.keys() | SPEC.keys()


def test_every_key_of_its_sections_has_a_rule_and_none_is_made_up() -> None:
    zero, offload = (importlib.import_module(f"deepspeed.runtime.zero.{name}") for name in ("config", "offload_config"))
    fields = zero.DeepSpeedZeroConfig.model_fields
    removed = importlib.import_module("deepspeed.runtime.config")._REMOVED_ZERO_CONFIG_KEYS
    assert ZERO.keys() == fields.keys() | removed.keys()
    assert {f"stage3_{name}" for name in STAGE3_NAMES} == {field.alias for field in fields.values() if field.alias}
    kinds = (offload.DeepSpeedZeroOffloadOptimizerConfig, offload.DeepSpeedZeroOffloadParamConfig)
    assert OFFLOAD.keys() == {name for kind in kinds for name in kind.model_fields}
    assert LEAF.keys() == fields["leaf_module"].annotation.model_fields.keys()
