"""A profile: which jobs have one, and how its table reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cluster.errors import UserError
from jobs import profiled
from jobs.profiled import Operator, Profile
from jobs.spec import JobSpec
from jobs.worker import profile

VALUES = {
    "name": "x",
    "phase": "pretrain",
    "model": {"architecture": "llama"},
    "data": {"train": "python-stdlib"},
    "training": {"steps": 10},
    "register": {"model": "m"},
}


def test_it_has_a_run_of_its_own_and_registers_nothing() -> None:
    spec = JobSpec.model_validate(VALUES)
    made = profiled.of(spec, 6)
    assert (made.name, made.register_, made.checkpoint.resume) == ("x-profile", None, "never")
    assert made.training == spec.training, "the schedule is that of the whole job"


def test_more_steps_than_the_job_has_are_refused() -> None:
    spec = JobSpec.model_validate(VALUES)
    with pytest.raises(UserError, match=r"the job has 10 steps.* 4 to warm up and 8 to record: record 6 \(--steps 6\)"):
        profiled.of(spec, 8)
    with pytest.raises(UserError, match=r"the job has 3 steps.* give it 5 steps or more"):
        profiled.check_length(1, 3)


@pytest.mark.parametrize(("phase", "hint"), [("evaluate", "profiled$"), ("sweep", "profile the spec of one of its")])
def test_a_job_without_steps_is_refused(phase: str, hint: str) -> None:
    spec = JobSpec.model_validate(VALUES).model_copy(update={"phase": phase})
    with pytest.raises(UserError, match=f"phase {phase} has no training steps of its own.*{hint}"):
        profiled.of(spec, 3)


def test_what_torch_has_recorded_becomes_a_table_of_operators_by_shape(tmp_path: Path) -> None:
    small, large = torch.ones(4, 8), torch.ones(64, 8)
    with torch.profiler.profile(activities=profile.activities(torch.device("cpu")), record_shapes=True) as profiler:
        for rows in (small, small, large):
            with torch.profiler.record_function("a mark"):
                torch.mm(rows, torch.ones(8, 16))
    found = profile.table(profiler.key_averages(group_by_input_shape=True), 3)
    products = {each.shapes: each.calls for each in found.operators if each.name == "aten::mm"}
    assert products == {"4x8 8x16": 2, "64x8 8x16": 1}
    assert "a mark" not in {each.name for each in found.operators}
    assert found.self_cpu_ms == pytest.approx(sum(each.self_cpu_ms for each in found.operators))
    assert Profile.of(found.as_dict()) == Profile(3, found.self_cpu_ms, 0.0, found.operators)


def test_the_table_goes_by_the_gpu_where_there_is_one() -> None:
    operators = [Operator("aten::mm", "4x8 8x16", 12, 1.0, 30.0), Operator("aten::add", "", 3, 5.0, 10.0)]
    on_gpu, on_cpu = Profile(2, 6.0, 40.0, operators), Profile(2, 10.0, 0.0, [Operator("aten::mm", "", 1, 2.5, 0.0)])
    assert profiled.text(on_gpu).splitlines() == [
        "share  GPU ms  CPU ms  calls  operator   shapes",
        "75.0%    30.0     1.0     12  aten::mm   4x8 8x16",
        "25.0%    10.0     5.0      3  aten::add",
    ]
    assert profiled.text(on_cpu).splitlines() == [
        "share  CPU ms  calls  operator  shapes",
        "25.0%     2.5      1  aten::mm",
    ]
    assert profiled.text(on_gpu, 1).splitlines()[-1] == "and 1 cheaper ones in the table's file"


def test_long_shapes_are_cut() -> None:
    assert profile.shapes([[2, 3], [], [4]]) == "2x3 4"
    assert profile.shapes(None) == ""
    assert len(profile.shapes([[1000, 1000]] * 50)) == profile.LONGEST_SHAPES
