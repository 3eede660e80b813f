"""Spec → DeepSpeed configuration."""

import json
import subprocess
import sys

import pytest
import torch

from cluster.errors import UserError
from jobs.spec import JobSpec, TrainingSpec
from jobs.worker import swap, zero


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


@pytest.mark.parametrize(
    ("section", "elsewhere"), [({"device": "cpu"}, True), ({"device": "none"}, False), ({"pin_memory": True}, False)]
)
def test_a_section_that_moves_nothing_is_no_offload(tmp_path, section, elsewhere):
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2, "offload_optimizer": section}}))
    read = zero.read_named(TrainingSpec(steps=1, deepspeed="ds.json"), tmp_path)
    assert zero.offloads(read["zero_optimization"]) is elsewhere
    assert not zero.offloads({"stage": 2})


def test_there_is_nothing_to_offload_at_stage_0():
    with pytest.raises(ValueError, match="offload: cpu has no effect at zero_stage: 0; set zero_stage to 1, 2 or 3"):
        TrainingSpec(steps=1, deepspeed={"zero_stage": 0, "offload": "cpu"})


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"zero_stage": 2, "offload": "nvme", "nvme_path": "/x"}, "offload: nvme is for zero_stage: 3, not 2"),
        ({"zero_stage": "auto", "offload": "nvme", "nvme_path": "/x"}, "offload: nvme is for zero_stage: 3, not auto"),
        ({"zero_stage": 3, "offload": "nvme"}, "offload_parameters: nvme, and nvme_path: .* go together"),
        ({"zero_stage": 3, "offload": "cpu", "nvme_path": "/x"}, "nvme, and nvme_path: .* go together"),
        ({"zero_stage": 3, "offload": "cpu", "offload_parameters": "nvme"}, "nvme, and nvme_path: .* go together"),
        (
            {"zero_stage": 2, "offload": "cpu", "offload_parameters": "nvme", "nvme_path": "/x"},
            "not zero_stage: 2 with",
        ),
        ({"zero_stage": 3, "offload_parameters": "nvme", "nvme_path": "/x"}, "zero_stage: 3 with offload: none"),
        ({"zero_stage": 3, "offload": "nvme", "nvme_path": "x"}, "nvme_path: x is a place on every node"),
    ],
)
def test_nvme_is_for_stage_3_and_needs_a_place(wanted, said):
    with pytest.raises(ValueError, match=said):
        TrainingSpec(steps=1, deepspeed=wanted)


@pytest.mark.parametrize("setting", [{"optimizer": "muon"}, {"micro_batch_size": "auto"}, {"compile": True}])
@pytest.mark.parametrize("key", ["offload", "offload_parameters"])
def test_what_nobody_has_shown_on_nvme_is_refused_with_its_place(setting, key):
    deepspeed = {"zero_stage": 3, "offload": "cpu", key: "nvme", "nvme_path": "/x"}
    values = {"name": "x", "task": "causal-lm", "model": {"from": "hf:x/y"}}
    values |= {"phase": "finetune", "data": {"train": "a.txt"}, "resources": {"gpus_per_worker": 1}}
    JobSpec.model_validate({**values, "training": {"steps": 1, "deepspeed": deepspeed}})
    (name,) = setting
    with pytest.raises(
        ValueError, match=rf"(?s)training\.{name}.*is not offered with `training.deepspeed.{key}: nvme`"
    ):
        JobSpec.model_validate({**values, "training": {"steps": 1, "deepspeed": deepspeed, **setting}})


def test_on_nvme_each_parameter_is_a_sub_group_and_each_rank_has_a_folder():
    made = config(deepspeed={"zero_stage": 3, "offload": "nvme", "nvme_path": "/x"})
    assert made["zero_optimization"]["sub_group_size"] == 1
    assert made["zero_optimization"]["offload_param"]["device"] == "cpu"
    placed = zero.with_swap_folder(made, swap.folder("/x", "run", "a1", 3))["zero_optimization"]["offload_optimizer"]
    assert (placed["device"], placed["nvme_path"]) == ("nvme", "/x/tandem-run/a1-3")
    assert made["zero_optimization"]["offload_optimizer"]["nvme_path"] == "/x", "what it was made of stays as it was"


def test_parameters_on_nvme_are_all_there_that_do_not_stay_gathered():
    deepspeed = {"zero_stage": 3, "offload": "cpu", "offload_parameters": "nvme", "nvme_path": "/x"}
    made = zero.with_swap_folder(config(deepspeed=deepspeed), swap.folder("/x", "run", "a1", 3))["zero_optimization"]
    placed = made["offload_param"]
    assert (placed["device"], placed["nvme_path"], placed["max_in_cpu"]) == ("nvme", "/x/tandem-run/a1-3", 0)
    assert made["offload_optimizer"]["device"] == "cpu"
    assert made["stage3_param_persistence_threshold"] == zero.PERSISTENT
    model = torch.nn.Sequential(torch.nn.Linear(400, 400), torch.nn.Linear(7, 400))
    assert swap.files_of(made, model, torch.bfloat16) == swap.Files([], 2 * 2 * 400 * 400)
    with pytest.raises(UserError, match=r"offload_parameters: nvme has no effect: no parameter .* more than 100,000"):
        swap.files_of(made, model[1], torch.bfloat16)
    swap.check_in_parts(model.to("meta"), [])
    with pytest.raises(UserError, match=r"offload_parameters: nvme .* begins whole: its head is new; leave it out"):
        swap.check_in_parts(torch.nn.Linear(400, 400), ["its head is new"])


def test_a_swap_folder_is_held_and_goes_and_so_does_what_a_killed_start_left(tmp_path):
    training = TrainingSpec(steps=1, deepspeed={"zero_stage": 3, "offload": "nvme", "nvme_path": str(tmp_path)})
    left, sibling = (swap.folder(str(tmp_path), "run", attempt, 0) for attempt in ("old", "new"))
    for folder in (left, sibling):
        folder.mkdir(parents=True)
    with swap.held(training, "run", "new", 1) as mine:
        assert mine is not None
        assert mine.is_dir()
        assert (left.exists(), sibling.exists()) == (False, True)
    assert (mine.exists(), sibling.exists()) == (False, True)
    with swap.held(TrainingSpec(steps=1), "run", "new", 1) as nothing:
        assert nothing is None


def test_a_swap_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nvme_path: .*/nowhere on the node .* is no folder; name one on a disk"):
        swap.check(tmp_path / "nowhere")


def test_a_node_without_the_room_or_the_right_to_lock_memory_is_named(tmp_path):
    folder = swap.folder(str(tmp_path), "run", "a", 0)
    folder.mkdir(parents=True)
    swap.check_node(folder, swap.Files([1000, 10], 10), 2, 2)
    with pytest.raises(UserError, match=r"MiB free, and its 4 workers keep 1,525,878,906 MiB there; make room"):
        swap.check_node(folder, swap.Files([10**14], 0), 4, 4)
    with pytest.raises(UserError, match=r"MiB free, and its 2 workers keep 953,674,316 MiB there; make room"):
        swap.check_node(folder, swap.Files([], 2 * 10**15), 4, 2)


def test_memory_that_may_not_be_locked_is_found():
    """In a process of its own, which is not root any more: that may lock more than its limit."""
    code = (
        "import resource; from jobs.worker.swap import can_lock; assert can_lock(1 << 16);"
        "resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 16, 1 << 16));"
        "import os; os.getuid() or os.setuid(65534); print(can_lock(1 << 16), can_lock(1 << 24))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "True False\n", done.stderr
