"""Spec → DeepSpeed configuration."""

import json

import pytest

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


def test_own_json_wins_over_tandems_settings_and_the_spec_keeps_what_is_its(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2, "reduce_bucket_size": 7}, "log_level": "info"}))
    training = TrainingSpec(steps=1, clip=0.5, deepspeed="ds.json")
    base = zero.read_named(training, tmp_path)
    made = zero.deepspeed_config(training, 2, 3, precision="bf16", on_gpu=False, base=base)
    assert made["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 7}
    assert (made["log_level"], made["gradient_clipping"]) == ("info", 0.5)
    assert made["bf16"]["enabled"]
    assert zero.stage_of(training, base) == 2


def test_there_is_nothing_to_offload_at_stage_0():
    with pytest.raises(ValueError, match="offload: cpu has no effect at zero_stage: 0; set zero_stage to 1, 2 or 3"):
        TrainingSpec(steps=1, deepspeed={"zero_stage": 0, "offload": "cpu"})
