"""Spec → DeepSpeed configuration."""

import json

import pytest

from cluster.errors import UserError
from jobs.spec import TrainingSpec
from jobs.worker import zero


def config(precision="bf16", **settings) -> dict:
    return zero.deepspeed_config(TrainingSpec(steps=1, **settings), 2, 3, precision=precision, on_gpu=False)


def test_batch_and_clipping_come_from_the_spec():
    made = config(clip=0.5)
    assert (made["train_micro_batch_size_per_gpu"], made["gradient_accumulation_steps"]) == (2, 3)
    assert made["gradient_clipping"] == 0.5


def test_bf16_keeps_fp32_masters_at_every_stage():
    assert config(deepspeed={"zero_stage": 0})["torch_autocast"]["enabled"]
    for stage in (1, 2, 3):
        made = config(deepspeed={"zero_stage": stage})
        assert made["bf16"]["enabled"]
        assert made["data_types"]["grad_accum_dtype"] == "fp32"


def test_fp32_enables_neither():
    assert not {"bf16", "torch_autocast"} & set(config(precision="fp32"))


def test_offload_of_parameters_needs_stage_3():
    assert "offload_param" not in config(deepspeed={"zero_stage": 2, "offload": "cpu"})["zero_optimization"]
    assert "offload_param" in config(deepspeed={"zero_stage": 3, "offload": "cpu"})["zero_optimization"]


def test_own_json_is_passed_through_without_auto(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(
        json.dumps({"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}, "prescale_gradients": True})
    )
    base = zero.read_deepspeed_json(path)
    training = TrainingSpec(steps=1, deepspeed="ds.json")
    made = zero.deepspeed_config(training, 2, 3, precision="bf16", on_gpu=False, base=base)
    assert made["zero_optimization"] == {"stage": 2}
    assert made["prescale_gradients"]
    assert made["bf16"]["enabled"]
    assert zero.stage_of(training, base) == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"train_batch_size": 8}', "the spec's `training` section decides"),
        ('{"elasticity": {}}', "removed"),
        ("[]", "not an object"),
        ("{", "cannot read"),
    ],
)
def test_json_that_contradicts_the_spec_is_refused(tmp_path, content, said):
    path = tmp_path / "ds.json"
    path.write_text(content)
    with pytest.raises(UserError, match=said):
        zero.read_deepspeed_json(path)


@pytest.mark.parametrize(
    ("zero_optimization", "expected"),
    [
        ({"stage": 3}, True),
        ({"stage": 3, "offload_param": {"device": "cpu"}}, True),
        ({"stage": 2}, False),
        ({"stage": 3, "offload_param": {"device": "nvme"}}, False),
        ({"stage": 3, "zero_quantized_weights": True}, False),
        ({"stage": 3, "mics_shard_size": 2}, False),
    ],
)
def test_what_deepspeed_does_more_to_parts_begins_whole(zero_optimization, expected):
    assert zero.sliceable({"zero_optimization": zero_optimization}) is expected
