"""`zero_stage: auto`: the lowest stage that is planned to fit, said with its reason, kept with the run, or refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.errors import UserError
from jobs import cli, run_choices
from jobs.driver import zero_stage
from jobs.driver.zero_stage import Place
from jobs.notes import DamagedNote
from jobs.plan import fit, memory
from jobs.plan.facts import Decoder, Facts
from jobs.plan.fit import Room
from jobs.plan.memory import Setting
from jobs.run_choices import Choices
from jobs.run_folder import RunFolder
from jobs.spec import JobSpec

GIB = 1 << 30
MODEL = Facts("X", 10**9, 10**9, 0, 0, 10**7, decoder=Decoder(24, 2048, 2048, 2048, 8192, True, True, 50_000))
GPU = Setting(0, "none", "bf16", 1, on_gpu=True)


def needs(stage: int, workers: int, rows: int, of: Setting = GPU) -> int:
    return memory.need(MODEL, Setting(stage, of.offload, of.precision, workers, of.on_gpu, rows * 1024)).peak


def room(workers: int, usable: int) -> Room:
    return Room(workers, int(usable / (1 - memory.FREE)) + 16)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_it_is_the_lowest_that_fits(stage: int) -> None:
    """Of 64 workers each stage needs less than the one before; a byte less than a stage needs is too little for it."""
    found = fit.lowest_stage(MODEL, GPU, 1024, [4], [room(64, needs(stage, 64, 4))])
    assert (found.stage, found.fits, found.rows) == (stage, True, 4)
    assert found.peak == needs(stage, 64, 4)
    assert f"ZeRO stage {stage}: the lowest whose peak is within" in found.sentence()
    assert "on 64 workers" in found.sentence()


def test_it_fits_every_size_of_an_elastic_group() -> None:
    few, many = room(4, needs(2, 4, 4)), room(64, needs(1, 64, 4))
    assert fit.lowest_stage(MODEL, GPU, 1024, [4], [many]).stage == 1
    assert fit.lowest_stage(MODEL, GPU, 1024, [4], [few, many]).stage == 2


def test_smaller_micro_batches_are_thought_of_only_where_the_spec_leaves_them_open() -> None:
    tight = room(64, needs(3, 64, 2))
    assert not fit.lowest_stage(MODEL, GPU, 1024, [16], [tight]).fits
    found = fit.lowest_stage(MODEL, GPU, 1024, [16, 8, 4, 2, 1], [tight])
    assert (found.stage, found.rows, found.fits) == (3, 2, True)
    assert fit.rows_to_try(spec({"micro_batch_size": "auto"}).training, 2) == [16, 8, 4, 2, 1]  # type: ignore[arg-type]
    assert fit.rows_to_try(spec({"micro_batch_size": 6}).training, 2) == [6]  # type: ignore[arg-type]
    assert fit.rows_to_try(spec({}).training, 8) == [4]  # type: ignore[arg-type]


def test_what_is_offloaded_stays_so() -> None:
    """The spec's offload is no way out that may be taken or left: without ZeRO there is none."""
    moved = Setting(0, "cpu", "bf16", 1, on_gpu=True)
    assert fit.lowest_stage(MODEL, GPU, 1024, [4], [Room(64, 10**15)]).stage == 0
    assert fit.lowest_stage(MODEL, moved, 1024, [4], [Room(64, 10**15)]).stage == 1


def test_stage_3_is_left_out_where_weights_are_not_to_be_divided() -> None:
    whole = dataclasses.replace(GPU, undivided="it is held whole")
    tight = [room(64, needs(3, 64, 4))]
    assert fit.lowest_stage(MODEL, GPU, 1024, [4], tight).stage == 3
    found = fit.lowest_stage(MODEL, whole, 1024, [4], tight)
    assert (found.stage, found.fits) == (2, False)
    said = fit.refusal(found, MODEL, whole, 1024)
    assert "no stage fits (stage 3 is left out: it is held whole). Stage 2 lacks least" in said
    assert "or name a stage, 0 to 2, to try it" in said
    moved = dataclasses.replace(whole, offload="cpu")
    assert fit.stages(moved) == (1, 2)


@pytest.mark.parametrize(
    ("training", "lora", "on_gpu", "said"),
    [
        ({}, None, False, ""),
        ({"compile": True}, None, True, ""),
        ({"compile": True}, None, False, "training.compile: on CPUs"),
        ({}, {"merge": False}, False, ""),
        ({}, {"merge": False, "base": "nf4"}, True, "model.lora.base: nf4 is held whole by every worker"),
    ],
)
def test_weights_are_not_divided_that_are_held_or_compiled_on_cpus(
    training: dict[str, Any], lora: dict[str, Any] | None, on_gpu: bool, said: str
) -> None:
    asked = spec(
        {**training, "deepspeed": {"zero_stage": "auto"}}, phase="finetune", model={"from": "/m", "lora": lora}
    )
    found = fit.undivided(asked, on_gpu)
    assert found.startswith(said)
    assert bool(found) == bool(said)


def test_a_refusal_names_what_is_missing_and_the_ways_out() -> None:
    small = room(2, needs(3, 16, 4))
    found = fit.lowest_stage(MODEL, GPU, 1024, [4], [small])
    assert not found.fits
    assert needs(found.stage, 2, 4) == min(needs(stage, 2, 4) for stage in range(4))
    said = fit.refusal(found, MODEL, GPU, 1024)
    assert f"{(needs(found.stage, 2, 4) - found.usable) / GIB:.2f} GiB are missing" in said
    for way in (
        "16 workers with as much memory each",
        "gradient_checkpointing: true",
        "offload: cpu",
        "sequence_length",
    ):
        assert way in said
    checkpointed = fit.refusal(found, MODEL, Setting(0, "cpu", "bf16", 1, True, checkpointing=True), 1024)
    assert "gradient_checkpointing" not in checkpointed
    assert "offload: cpu" not in checkpointed
    assert "workers with more memory" in fit.refusal(
        fit.lowest_stage(MODEL, GPU, 1024, [4], [Room(2, 1)]), MODEL, GPU, 1024
    )


def spec(training: dict[str, Any], **sections: Any) -> JobSpec:
    model = {"architecture": "llama"}
    values = {"name": "j", "phase": "pretrain", "model": model, "data": {"train": "x"}, **sections}
    return JobSpec.model_validate({**values, "training": {"steps": 1, **training}})


def test_a_stage_takes_the_place_of_auto_and_changes_no_digest() -> None:
    asked = spec({"deepspeed": {"zero_stage": "auto", "offload": "cpu"}})
    assert fit.is_open(asked)
    made = fit.with_stage(asked, 2)
    assert not fit.is_open(made)
    deepspeed = made.training.deepspeed.model_dump()  # type: ignore[union-attr]
    assert deepspeed == {"zero_stage": 2, "offload": "cpu", "offload_parameters": "cpu", "nvme_path": None}
    assert made.digest() == asked.digest() == spec({"micro_batch_size": "auto"}).digest()
    assert not fit.is_open(spec({"deepspeed": "mine.json"}))
    with pytest.raises(ValueError, match="0, 1, 2, 3 or 'auto'"):
        spec({"deepspeed": {"zero_stage": "Auto"}})
    with pytest.raises(ValueError, match="micro_batch_size"):
        spec({"micro_batch_size": "most"})


def test_workers_of_a_node_share_its_memory_and_not_their_gpus() -> None:
    nodes = {"a": Place(100, 4), "b": Place(60, 4)}
    two, elastic = spec({}, resources={"workers": 2}), spec({}, resources={"workers": {"min": 1, "max": 8}})
    assert zero_stage.rooms_of(two, nodes, {"a": 1, "b": 1}) == [Room(2, 60)]
    assert zero_stage.rooms_of(two, nodes, {}) == [Room(2, 30)], "both may come to one node"
    assert zero_stage.rooms_of(elastic, nodes, {"a": 4, "b": 4}) == [Room(1, 60), Room(8, 15)]
    on_gpus = spec({}, resources={"workers": 8, "gpus_per_worker": 1})
    assert zero_stage.rooms_of(on_gpus, nodes, {"a": 4, "b": 4}) == [Room(8, 60)]


def test_a_run_goes_on_as_it_began(tmp_path: Path) -> None:
    choices = RunFolder(tmp_path).choices
    assert choices.zero_stage("none") is None
    choices.keep_zero_stage(2, "none")
    choices.keep_micro_batch(2, 16)
    choices.keep_micro_batch(1, 8)
    RunFolder(tmp_path).begin()
    assert choices.zero_stage("none") == 2
    assert choices.zero_stage("cpu") is None, "the spec asks for something else now"
    assert choices.micro_batches() == {2: 16, 1: 8}
    (tmp_path / "zero.json").write_text('{"zero_stage": "auto", "offload": "none"}')
    with pytest.raises(DamagedNote, match="it says stage 'auto'"):
        choices.zero_stage("none")
    (tmp_path / "micro_batches.json").write_text('{"2": 0}')
    with pytest.raises(DamagedNote, match="not numbers of rows"):
        choices.micro_batches()


def test_a_run_that_began_at_stage_3_and_compiles_now_decides_anew() -> None:
    asked = {"deepspeed": {"zero_stage": "auto"}}
    assert zero_stage.as_begun(spec(asked), None) == (None, [])
    assert zero_stage.as_begun(spec(asked), 3) == (3, ["stage 3, as the run began"])
    compiled = spec({**asked, "compile": True})
    assert zero_stage.as_begun(compiled, 2)[0] == 2
    stage, (said,) = zero_stage.as_begun(compiled, 3)
    assert stage is None
    assert "began at stage 3, which is left out now: training.compile" in said
    on_gpus = spec({**asked, "compile": True}, resources={"gpus_per_worker": 1})
    assert zero_stage.as_begun(on_gpus, 3)[0] == 3


def test_params_have_no_auto_and_what_was_chosen_as_soon_as_it_is_known(tmp_path: Path) -> None:
    asked = spec({"deepspeed": {"zero_stage": "auto"}, "micro_batch_size": "auto"}).resolved()
    params = run_choices.without_open(asked)
    assert params["training"]["deepspeed"] == {"offload": "none", "offload_parameters": "cpu", "nvme_path": None}
    assert "micro_batch_size" not in params["training"]
    assert asked["training"]["micro_batch_size"] == "auto"
    choices = Choices(tmp_path)
    assert choices.found(asked) == {}
    choices.keep_zero_stage(3, "none")
    assert choices.found(asked) == {"training": {"deepspeed": {"zero_stage": 3}}}
    choices.keep_micro_batch(2, 16)
    choices.keep_micro_batch(1, 8)
    choices.keep_micro_batch(2, 4)
    merged = run_choices.merged(params, choices.found(asked))["training"]
    assert merged["deepspeed"] == {"zero_stage": 3, "offload": "none", "offload_parameters": "cpu", "nvme_path": None}
    assert merged["micro_batch_size"] == 4, "the newest"
    assert merged["steps"] == 1
    written = spec({"deepspeed": {"zero_stage": 1}, "micro_batch_size": 2}).resolved()
    assert choices.found(written) == {}
    assert run_choices.without_open(written) == written


SEVENTY = """\
name: big
phase: pretrain
task: {name: causal-lm, sequence_length: 4096}
model:
  architecture: llama
  config: {vocab_size: 128256, hidden_size: 8192, intermediate_size: 28672, num_hidden_layers: 80,
    num_attention_heads: 64, num_key_value_heads: 8}
data: {train: nowhere/*.parquet}
training: {steps: 100, global_batch_size: 1024, micro_batch_size: 1, gradient_checkpointing: true,
  deepspeed: {zero_stage: auto}}
"""


@pytest.mark.parametrize(
    ("devices", "stage", "said"),
    [
        ("64", 3, "zero_stage auto: ZeRO stage 3: the lowest whose peak is within"),
        ("8", 3, "GiB are missing. Ways out:"),
    ],
)
def test_a_plan_shows_what_auto_comes_to(tmp_path: Path, devices: str, stage: int, said: str) -> None:
    (tmp_path / "spec.yaml").write_text(SEVENTY)
    command = ["plan", str(tmp_path / "spec.yaml"), "--device", "h100", "--devices", devices]
    printed = CliRunner().invoke(cli.app, command)
    assert printed.exit_code == 0, printed.output
    assert said in printed.output
    found = json.loads(CliRunner().invoke(cli.app, [*command, "--json"]).stdout)
    assert said in found["notes"][0]
    assert (found["recommended"] or {"zero_stage": 3})["zero_stage"] == stage


def test_a_plan_shows_how_many_rows_should_fit(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(SEVENTY)
    set_ = ["--set", "training.micro_batch_size=auto", "--set", "training.deepspeed.zero_stage=3", "--json"]
    for devices, rows in (("64", 16), ("32", 4)):
        command = ["plan", str(tmp_path / "spec.yaml"), "--device", "h100", "--devices", devices, *set_]
        found = json.loads(CliRunner().invoke(cli.app, command).stdout)
        of = 1024 // int(devices)
        assert found["micro_batch"] <= of
        assert f"{found['micro_batch']} of a worker's {of} rows should fit" in found["notes"][0]
        (stage_3,) = (each for each in found["memory"] if (each["zero_stage"], each["offload"]) == (3, "none"))
        assert stage_3["fits"], rows


@pytest.mark.parametrize(
    ("training", "said"),
    [({"micro_batch_size": "auto"}, "give a number"), ({"deepspeed": {"zero_stage": "auto"}}, "name a stage")],
)
def test_trials_of_a_sweep_which_run_beside_each_other_find_nothing_out(training: dict[str, Any], said: str) -> None:
    sweep = {"phase": "sweep", "sweep": {"trials": 2, "parameters": {"training.learning_rate": {"values": [1, 2]}}}}
    with pytest.raises(ValueError, match=f"phase sweep takes no `auto` here: .*{said}"):
        spec(training, **sweep)


def test_a_model_is_counted_as_what_will_train(tmp_path: Path) -> None:
    """With adapters, on the meta device, and torch's random state as it was."""
    import torch

    from jobs.tasks import get

    config = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
              "vocab_size": 400}  # fmt: skip
    adapted = spec({}, model={"architecture": "llama", "config": config, "lora": {"rank": 2}})
    from tests.support import tiny_models

    task = get("causal-lm").load(tiny_models.language_model(tmp_path / "m"), {})
    before = torch.get_rng_state()
    found = fit.facts_of(adapted, task, None)
    assert torch.equal(before, torch.get_rng_state())
    assert 0 < found.trainable < found.frozen
    with pytest.raises(UserError, match="hidden_size"):
        fit.facts_of(spec({}, model={"architecture": "llama", "config": {"hidden_siz": 4}}), task, None)
