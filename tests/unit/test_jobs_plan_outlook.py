"""What a run's log says of its plan, and what is noted beside it when the run ends."""

import dataclasses
import json

import pytest
import torch

from jobs.driver import planned
from jobs.plan import devices, facts, outlook, plan
from jobs.plan.outlook import Outlook
from jobs.run_folder import RunFolder
from jobs.run_notes import Attempt
from jobs.spec import JobSpec
from jobs.tasks import get
from jobs.worker import energy
from jobs.worker import planned as worker_planned
from tracking import plan_errors
from tracking.plan_errors import Beside

GIB = 1 << 30
EXPECTED = Outlook(2, "ZeRO 1, fp32", 12 * GIB, 3 * GIB // 2, 0.5, 600.0, "rates measured on a CPU", time_ms=1000)


def test_the_line_says_memory_against_what_there_is_and_the_time():
    assert outlook.line(EXPECTED) == (
        "plan: 1.5 GiB of 12.0 GiB for each of 2 workers, ZeRO 1, fp32; "
        "10.0 min (0.5 s a step) by rates measured on a CPU"
    )
    assert outlook.line(dataclasses.replace(EXPECTED, duration_s=None)).endswith(
        "; 0.5 s a step by rates measured on a CPU"
    )


def test_the_line_says_what_is_not_known_and_what_would_fit():
    unmeasured = dataclasses.replace(EXPECTED, step_s=None, duration_s=None, advice="ZeRO 3 would fit")
    said = outlook.line(unmeasured)
    assert "no time without rates (tandem jobs plan --calibrate)" in said
    assert said.endswith("; ZeRO 3 would fit")
    unknown = dataclasses.replace(EXPECTED, peak_bytes=None, workers=1, said=("no transformer",))
    assert (
        outlook.line(unknown)
        == "plan: memory is not known (no transformer); 12.0 GiB for each of 1 worker, ZeRO 1, fp32"
    )


def entry(time_ms: int, **metrics: float) -> dict:
    return {"step": 1, "time_ms": time_ms, "metrics": metrics}


def test_what_an_earlier_start_took_does_not_count():
    steps = [
        entry(900, step_time_s=9.0),
        entry(1000, step_time_s=0.4),
        entry(1100, step_time_s=0.6),
        entry(1200, loss=1),
    ]
    memory = [entry(999, **{"peak_memory_bytes/rank-0": 9e9}), entry(1001, **{"peak_memory_bytes/rank-0": 1e9}),
              entry(1002, **{"peak_memory_bytes/rank-1": 2e9})]  # fmt: skip
    found = outlook.measured(EXPECTED, steps, memory)
    assert (found.measured_step_s, found.measured_peak_bytes) == (0.5, 2 * 10**9)
    nothing = outlook.measured(EXPECTED, [], [])
    assert (nothing.measured_step_s, nothing.measured_peak_bytes) == (None, None)


class Recorder:
    """An MLflow run's two methods, kept in lists."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self.tags: dict[str, str] = {}

    def log_metrics(self, metrics):
        self.metrics |= metrics

    def set_tags(self, tags):
        self.tags |= tags


def test_a_run_is_told_its_plan_once_and_at_its_end_what_it_took(tmp_path, capsys):
    folder, run = RunFolder(tmp_path), Recorder()
    assert planned.say(folder, None, lambda call: call(run)) is None
    folder.write_outlook(EXPECTED)
    said = planned.say(folder, None, lambda call: call(run))
    assert planned.say(folder, said, lambda call: call(run)) == said
    assert capsys.readouterr().out.count("tandem: plan: 1.5 GiB of 12.0 GiB") == 1
    assert run.tags == {"tandem.plan": "2 × ZeRO 1, fp32, time by rates measured on a CPU"}
    assert run.metrics == {"plan_peak_memory_bytes": 1.5 * GIB, "plan_step_time_s": 0.5}
    folder.spool.mkdir()
    folder.rank_0_spool.write_text("\n".join(map(json.dumps, [entry(1500, step_time_s=0.25)])) + '\n{"half')
    (folder.spool / "memory-rank-1.jsonl").write_text(
        json.dumps(entry(1500, **{"peak_memory_bytes/rank-1": 2.0 * GIB}))
    )
    planned.settle(folder, lambda call: call(run))
    kept = folder.outlook()
    assert (kept.measured_peak_bytes, kept.measured_step_s, kept.measured_joules) == (2 * GIB, 0.25, None)
    assert run.metrics["plan_measured_peak_memory_bytes"] == 2 * GIB
    assert run.metrics["plan_measured_step_time_s"] == 0.25
    assert "energy_joules" not in run.metrics


def test_a_damaged_plan_ends_no_run(tmp_path):
    (tmp_path / "plan.json").write_text("[")
    planned.settle(RunFolder(tmp_path), pytest.fail)


def test_energy_is_summed_over_ranks_and_starts_and_not_told_by_half(tmp_path):
    folder = RunFolder(tmp_path)
    folder.spool.mkdir()
    folder.write_attempt(Attempt("a", 2, 1))
    lines = [entry(1, **{"energy_joules/rank-0": value}) for value in (5.0, 9.0, 2.0, 4.0)]
    (folder.spool / "energy-rank-0.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert planned.joules(folder) is None
    (folder.spool / "energy-rank-1.jsonl").write_text(json.dumps(entry(1, **{"energy_joules/rank-1": 10.0})))
    assert planned.joules(folder) == 9 + 4 + 10
    assert energy.total([]) == 0


def test_errors_have_a_sign_and_their_spread_has_none():
    assert Beside(110.0, 100.0).error == pytest.approx(0.1)
    assert [Beside(*pair).error for pair in ((None, 1.0), (1.0, None), (1.0, 0.0))] == [None] * 3
    found = plan_errors.spread([0.1, None, -0.3, 0.05])
    assert (found.runs, found.median, found.worst) == (3, pytest.approx(0.1), pytest.approx(0.3))
    assert plan_errors.spread([None]) is None


# -- the first worker's plan -----------------------------------------------------------------------------------------


def noted(folder, task: str, options: dict, model, described=None) -> Outlook:
    values = {
        "name": "x", "phase": "pretrain", "task": {"name": task, **options}, "model": {"architecture": "llama"},
        "data": {"train": "x"}, "training": {"steps": 10, "precision": "fp32", "micro_batch_size": 4},
    }  # fmt: skip
    spec = JobSpec.model_validate(values)
    group = plan.Group(devices.this_machine(2), 2, "fp32", 4, 300 << 20)
    run = RunFolder(folder)
    worker_planned.note(run, spec, get(task)(options), facts.of(model), described or (lambda: group))
    found = run.outlook()
    assert found is not None
    return found


def test_the_first_worker_plans_with_its_own_process_and_group(tmp_path):
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    found = noted(tmp_path, "causal-lm", {"sequence_length": 32}, model)
    assert (found.workers, found.layout, found.step_s) == (2, "ZeRO 1, fp32", None)
    assert found.room_bytes == devices.this_machine(2).memory_bytes
    assert 300 << 20 < found.peak_bytes < 310 << 20
    assert found.time_ms > 1.7e12


def test_a_plan_that_cannot_be_made_says_why_and_ends_no_run(tmp_path):
    other = noted(tmp_path, "causal-lm", {}, torch.nn.Linear(3, 4))
    assert other.peak_bytes is None
    assert "what the layers of Linear keep is not" in outlook.line(other)

    def fail() -> plan.Group:
        raise OSError("no such device")

    assert outlook.line(noted(tmp_path, "causal-lm", {}, torch.nn.Linear(3, 4), fail)) == (
        "plan: memory is not known (OSError: no such device)"
    )
