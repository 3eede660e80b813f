"""What two ranks measure of their steps in the real loop, at every ZeRO stage."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from jobs.profiled import WARM_UP, Profile
from jobs.run_folder import RunFolder
from tests.support import two_ranks
from tests.support.metered_ranks import kept

STAGES = ("0", "1", "2", "3")
PROFILED, COMPILED = "3-profile", "1-compile"
STEPS, ROWS, MICRO_BATCHES = 6, 8, 2
PARTS = ("forward_s", "backward_s", "loss_sum_s", "optimizer_s", "buffers_s")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks have left, at each stage."""
    folder = tmp_path_factory.mktemp("metered")
    rows = np.random.default_rng(0).normal(size=(64, 5))
    lines = [json.dumps({**{f"x{at}": value for at, value in enumerate(row)}, "y": sum(row)}) for row in rows]
    (folder / "x.jsonl").write_text("\n".join(lines))
    values = {
        "name": "x",
        "phase": "pretrain",
        "task": {"name": "tabular", "target_column": "y"},
        "model": {"architecture": "mlp", "config": {"hidden_size": 256, "layers": 2}},
        "data": {"train": "x.jsonl", "eval_fraction": 0},
        "training": {"steps": STEPS, "global_batch_size": ROWS, "micro_batch_size": 2, "learning_rate": 0.01},
    }
    (folder / "spec.json").write_text(json.dumps(values))
    two_ranks.run("metered_ranks", folder, [*STAGES, PROFILED, COMPILED], timeout_s=600)
    return folder


def steps_of(folder: Path, stage: str) -> list[dict[str, float]]:
    lines = (folder / stage / "run" / "spool" / "rank-0.jsonl").read_text().splitlines()
    return [record["metrics"] for record in map(json.loads, lines) if "loss" in record["metrics"]]


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_is_the_sum_of_its_parts_and_the_loop(folder: Path, stage: str) -> None:
    steps = steps_of(folder, stage)
    assert len(steps) == STEPS
    for step in steps:
        assert 0 < sum(step[part] for part in PARTS) + step["data_wait_s"] <= step["step_time_s"]
        assert min(step["forward_s"], step["backward_s"], step["optimizer_s"]) > 0


@pytest.mark.parametrize("stage", [*STAGES, COMPILED])
def test_communication_is_timed_within_the_parts(folder: Path, stage: str) -> None:
    for step in steps_of(folder, stage):
        assert 0 < step["communication_s"] <= sum(step[part] for part in PARTS)


@pytest.mark.parametrize("stage", STAGES)
def test_the_flops_are_those_of_all_rows_at_every_stage(folder: Path, stage: str) -> None:
    """Nearly 6 a weight and row: the first layers need no gradient of what they are given."""
    weights = int((folder / stage / "weights").read_text())
    found = {round(step["model_flops_per_second"] * step["step_time_s"]) for step in steps_of(folder, stage)}
    assert 0.9 * 6 * weights * ROWS < max(found) <= 6 * weights * ROWS
    assert max(found) - min(found) < 1e-5 * max(found), "counted and known ones agree"
    of_stage_0 = steps_of(folder, "0")[0]
    expected = of_stage_0["model_flops_per_second"] * of_stage_0["step_time_s"]
    assert max(found) == pytest.approx(expected, rel=1e-5)
    assert not any("mfu" in step for step in steps_of(folder, stage)), "the peak of a CPU is not known"


@pytest.mark.parametrize(
    ("stage", "numbers_a_weight"),
    [("0", 2), ("1", 3), ("2", 2 * MICRO_BATCHES + 1), ("3", 3 * MICRO_BATCHES)],
)
def test_collectives_are_what_zero_takes(folder: Path, stage: str, numbers_a_weight: int) -> None:
    """Of two ranks each sends half. At stage 3 weights gathered at the end of a forward pass may serve twice."""
    weights = int((folder / stage / "weights").read_text())
    told = [step["collective_bytes"] for step in steps_of(folder, stage) if "collective_bytes" in step]
    assert len(told) == 1
    assert told[0] == pytest.approx(numbers_a_weight * weights * 4 / 2, rel=0.05)


def test_each_rank_tells_its_memory(folder: Path) -> None:
    for rank in range(2):
        spool = folder / "0" / "run" / "spool" / f"memory-rank-{rank}.jsonl"
        records = [json.loads(line) for line in spool.read_text().splitlines()]
        assert records[0]["step"] == 1
        assert records[0]["metrics"][f"peak_memory_bytes/rank-{rank}"] > 100 << 20


@pytest.mark.parametrize("rank", [0, 1])
def test_a_profile_has_the_recorded_steps_of_each_rank_and_nothing_is_saved(folder: Path, rank: int) -> None:
    left = RunFolder(folder / PROFILED / "run")
    found = Profile.of(json.loads((left.profile / f"rank-{rank}.operators.json").read_text()))
    losses = [each for each in found.operators if each.name == "aten::mse_loss"]
    assert sum(each.calls for each in losses) == (STEPS - WARM_UP) * MICRO_BATCHES, "and none of the warm-up"
    products = [each for each in found.operators if (each.name, each.shapes) == ("aten::addmm", "512 2x256 256x512")]
    assert sum(each.calls for each in products) == 2 * (STEPS - WARM_UP) * MICRO_BATCHES, "one of each layer"
    assert 0 < sum(each.self_cpu_ms for each in found.operators) <= found.self_cpu_ms * (1 + 1e-9)
    assert found.operators[0].self_cpu_ms == max(each.self_cpu_ms for each in found.operators)
    with gzip.open(left.profile / f"rank-{rank}.trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    assert sum(each.get("name") == "aten::mse_loss" for each in events) == (STEPS - WARM_UP) * MICRO_BATCHES
    assert not list((folder / PROFILED).glob("step-*"))
    assert steps_of(folder, PROFILED)[-1]["loss"] == pytest.approx(steps_of(folder, "3")[-1]["loss"], rel=1e-6)


def test_a_compiled_model_learns_and_counts_the_same_and_is_kept(folder: Path) -> None:
    plain, compiled = steps_of(folder, "1"), steps_of(folder, COMPILED)
    for expected, found in zip(plain, compiled, strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert found["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-4)
        flops = [step["model_flops_per_second"] * step["step_time_s"] for step in (expected, found)]
        assert flops[0] == pytest.approx(flops[1])
    worked = [step for step in compiled if "compile_s" in step]
    assert 0 < sum(step["compile_s"] for step in worked) < sum(step["step_time_s"] for step in worked)
    assert "compile_s" not in compiled[-1], "the last steps go by what was compiled"
    assert list(kept(folder).rglob("*.so"))
    (said,) = [each for each in RunFolder(folder / COMPILED / "run").remarks() if each.startswith("compiled the model")]
    assert f"finds that in {kept(folder)}" in said
