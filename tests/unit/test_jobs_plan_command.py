"""`tandem jobs plan`: no data, no weights, no cluster; mistakes end with 2 and their place."""

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import tandem
from cluster import specfile
from cluster.errors import UserError
from cluster.home import home
from jobs import cli
from jobs.plan import at_submit, facts, rates, skeleton
from jobs.plan import plan as planner
from jobs.spec import JobSpec
from tests.support import tiny_models

SEVENTY = """\
name: big
phase: pretrain
task: {name: causal-lm, sequence_length: 4096}
model:
  architecture: llama
  config: {vocab_size: 128256, hidden_size: 8192, intermediate_size: 28672, num_hidden_layers: 80,
    num_attention_heads: 64, num_key_value_heads: 8}
data: {train: nowhere/*.parquet}
training: {steps: 100, global_batch_size: 1024, micro_batch_size: 1, gradient_checkpointing: true}
"""
TINY = """\
name: tiny
phase: pretrain
model:
  architecture: llama
  config: {hidden_size: 64, intermediate_size: 96, num_hidden_layers: 2, num_attention_heads: 4}
data: {train: nowhere.txt}
training: {steps: 10}
"""


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "home"))  # without a calibration

    def run(spec: str, *arguments: str) -> Result:
        Path("spec.yaml").write_text(spec)
        return CliRunner().invoke(cli.app, ["plan", "spec.yaml", *arguments])

    return run


def test_what_seventy_billions_on_64_h100_need(plan):
    done = plan(SEVENTY, "--device", "h100", "--devices", "64", "--price-per-hour", "2", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["model"]["parameters"] == 70_553_706_496  # what Llama 3 70B has
    assert found["recommended"] == {"zero_stage": 3, "offload": "none"}
    assert [each["fits"] for each in found["memory"] if each["offload"] == "none"] == [False, False, False, True]
    flops = (6 * (70_553_706_496 - 128256 * 8192) + 12 * 80 * 8192 * 4096) * 4 / 3
    assert found["flops_per_token"] == pytest.approx(flops)
    assert found["step_s"] == pytest.approx(flops * 16 * 4096 / (989.4e12 * 0.4))
    assert found["cost"] == pytest.approx(found["step_s"] * 100 / 3600 * 64 * 2)


def test_a_reader_sees_what_fits_what_was_assumed_and_what_is_left_out(plan):
    said = plan(TINY, "--devices", "2").output
    assert "an estimate; nothing was started" in said
    assert "recommended: training.deepspeed: {zero_stage: 0}" in said
    assert "fits, the spec's" in said
    assert "a vocabulary of 4,096 tokens is assumed" in said
    assert "no time: the rate of this machine is not known" in said
    assert "not counted:" in said


def test_what_the_micro_batch_does(plan):
    """Memory follows it; another batch on more workers leaves some without rows, which is said."""
    wide, narrow = (
        json.loads(plan(TINY, "--json", "--set", f"training.micro_batch_size={rows}").stdout) for rows in (8, 4)
    )
    assert wide["memory"][0]["activations"] > 1.9 * narrow["memory"][0]["activations"]
    assert wide["memory"][0]["weights"] == narrow["memory"][0]["weights"]
    assert "32 of 64 workers would have no rows" in plan(TINY, "--device", "l4", "--devices", "64").output


def test_a_classifier_is_counted_with_the_labels_of_its_data(plan):
    rows = [{"a": n, "b": n / 2, "y": "no" if n % 2 else "yes"} for n in range(40)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    spec = {
        "name": "t", "phase": "pretrain", "task": {"name": "tabular", "target_column": "y"},
        "model": {"architecture": "mlp"}, "data": {"train": "rows.jsonl"}, "training": {"steps": 1},
    }  # fmt: skip
    done = plan(json.dumps(spec))
    assert done.exit_code == 0, done.output
    assert "those of the first 40 examples" in done.output
    assert "is no causal transformer" in done.output


@pytest.mark.parametrize("name", ["forecast", "gan"])
def test_a_model_without_memory_has_the_parameters_of_a_whole_one(name):
    """Of a forecaster, whose examples are made of several rows, and of two networks that learn from each other."""
    path = Path(cli.__file__).parent / "specs" / f"{name}.yaml"
    spec = specfile.load(path, JobSpec)
    model, task, _ = skeleton.build(spec, path.parent)
    whole = task.build(spec.model.architecture, spec.model.config)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert facts.of(model) == facts.of(whole)


@pytest.mark.parametrize(
    ("task", "make"),
    [("causal-lm", tiny_models.language_model), ("image-classification", tiny_models.image_classifier)],
)
def test_a_parent_is_counted_by_its_config(plan, task, make):
    from safetensors import safe_open

    folder = make(Path("parent").absolute())
    with safe_open(folder / "model.safetensors", "pt") as weights:
        held = sum(weights.get_tensor(name).numel() for name in weights.keys())  # noqa: SIM118 (no mapping)
    spec = {
        "name": "t", "phase": "finetune", "task": task, "model": {"from": str(folder)},
        "data": {"train": "nowhere.txt"}, "training": {"steps": 1},
    }  # fmt: skip
    done = plan(json.dumps(spec), "--json")
    assert done.exit_code == 0, done.exception
    assert json.loads(done.stdout)["model"]["parameters"] == held
    if task == "causal-lm":
        adapted = json.loads(plan(json.dumps(spec), "--json", "--set", "model.lora={rank: 2}").stdout)
        assert adapted["model"]["parameters"] - adapted["model"]["trainable"] == held
        assert adapted["optimal_tokens"] is None  # it begins with learned weights
        lora = "model.lora={rank: 2, merge: false, base: nf4}"
        few = json.loads(plan(json.dumps(spec), "--json", "--set", lora).stdout)
        assert [each["zero_stage"] for each in few["memory"]] == [0, 1, 2]
        assert few["memory"][0]["weights"] < adapted["memory"][0]["weights"]
        assert few["model"]["parameters"] == adapted["model"]["parameters"]
        assert any("ZeRO stage 3 is left out: model.lora.base: nf4" in said for said in few["notes"])


@pytest.mark.parametrize(
    ("spec", "arguments", "said"),
    [
        (TINY, ["--device", "h10"], "--device: 'h10' is no device whose figures are known; did you mean 'h100' or"),
        (TINY + "resources: {gpus_per_worker: 1}\n", [], "spec.yaml:8: `resources.gpus_per_worker` is 1"),
        (TINY, ["--set", "resources.gpus_per_worker=2"], "--set resources.gpus_per_worker: `resources"),
        ("name: x\nphase: evaluate\nmodel: {from: y}\ndata: {eval: z}\n", [], "spec.yaml:2: phase evaluate trains"),
        (TINY, ["--set", "model.config.hiden_size=8"], "llama has no 'hiden_size'; did you mean 'hidden_size'"),
        (TINY.replace("pretrain", "pretrian"), [], "spec.yaml:2"),
        (TINY.replace("architecture: llama", "from: ./absent").replace("  config", "  #"), [], "absent"),
        ("name: x\nphase: pretrain\ntask: image-classification\nmodel: {architecture: cnn}\n"
         "data: {train: ./none}\ntraining: {steps: 1}\n", [], "data.train: the size of a model"),
    ],
)  # fmt: skip
def test_a_mistake_ends_with_2_and_its_place(plan, spec, arguments, said, monkeypatch, capsys):
    plan(spec)
    monkeypatch.setattr("sys.argv", ["tandem", "jobs", "plan", "spec.yaml", *arguments])
    with pytest.raises(SystemExit) as ended:
        tandem.main()
    assert ended.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("option", ["--devices 0", "--mfu 2", "--mfu nan", "--price-per-hour -1"])
def test_options_out_of_range_end_with_2(plan, option):
    assert plan(TINY, *option.split()).exit_code == 2


def test_the_cost_is_that_of_a_table_where_there_is_one(plan):
    on_h100 = ["--device", "h100", "--devices", "64"]
    Path("prices.yaml").write_text("currency: EUR\nper_hour: {H100: 2, cpu: 0.25}\n")
    by_table = json.loads(plan(SEVENTY, *on_h100, "--prices", "prices.yaml", "--json").stdout)
    by_hand = json.loads(plan(SEVENTY, *on_h100, "--price-per-hour", "2", "--json").stdout)
    assert by_table["cost"] == by_hand["cost"] > 0
    assert (by_table["price"]["currency"], by_hand["price"]["currency"]) == ("EUR", "")
    assert " EUR at 2 a device and hour (prices.yaml)" in plan(SEVENTY, *on_h100, "--prices", "prices.yaml").output
    assert json.loads(plan(SEVENTY, *on_h100, "--json").stdout)["cost"] is None
    home().mkdir(exist_ok=True)
    Path("prices.yaml").rename(home() / "prices.yaml")
    assert json.loads(plan(SEVENTY, *on_h100, "--json").stdout)["cost"] == by_table["cost"]
    calibrated()
    here = json.loads(plan(TINY, "--json", "--set", "training.precision=fp32").stdout)
    assert here["cost"] == pytest.approx(here["duration_s"] / 3600 * 0.25)
    assert "no cost: " in plan(SEVENTY, "--device", "l4").output


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("per_hour:\n  h101: 2\n", "prices.yaml:2: `per_hour`: 'h101' is no device whose figures are known: h100, "),
        ("per_hour: {h100: 2, H100: 3}\n", "prices.yaml:1: `per_hour`: 'H100' is there twice"),
        ("per_hour:\n  l4: 1\n  h100: much\n", "prices.yaml:3"),
        ("per_hour: {h100: -1}\n", "prices.yaml:1"),
        ("per_hour: {h100: true}\n", "prices.yaml:1"),
        ("per_hour: {h100: .inf}\n", "prices.yaml:1"),
        ("per_hours: {h100: 1}\n", "prices.yaml:1: unknown key `per_hours` in the spec; did you mean `per_hour`"),
        ("per_hour: {}\n", "prices.yaml:1"),
        ("per_hour: {l4: 1}\n", "prices.yaml has no price of H100 SXM 80 GB (per_hour.h100); it has those of l4"),
        (None, "--prices: prices.yaml is no file"),
    ],
)  # fmt: skip
def test_a_table_of_prices_is_refused_by_its_place(plan, table, said):
    if table is not None:
        Path("prices.yaml").write_text(table)
    done = plan(SEVENTY, "--device", "h100", "--devices", "64", "--prices", "prices.yaml")
    assert isinstance(done.exception, UserError)
    assert said in str(done.exception)


def test_a_price_is_said_once(plan):
    done = plan(TINY, "--prices", "prices.yaml", "--price-per-hour", "2")
    assert isinstance(done.exception, UserError)
    assert "give one of them" in str(done.exception)


def test_what_is_computed_again_or_learned_by_muon_is_planned_and_said(plan):
    done = plan(TINY, "--set", "training.gradient_checkpointing=selective", "--set", "training.optimizer=muon")
    assert "activations but products and attention computed again" in done.output
    assert "note: of Muon, what a matrix takes while it is made orthogonal" in done.output
    assert "ZeRO stage 3 is left out" not in done.output
    compiled = plan(TINY, "--set", "training.compile=true").output
    assert "note: ZeRO stage 3 is left out: training.compile: on CPUs" in compiled
    assert "note: the model is counted as it is written" in compiled


def test_help_names_every_known_device():
    from jobs.plan.devices import KNOWN

    said = " ".join(CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, ["plan", "--help"]).output.split())
    assert [name for name in KNOWN if name not in said] == []
    assert "starts no job" in said


# -- measured rates, replicas, one line ------------------------------------------------------------------------------


def calibrated(workers: int = 1) -> None:
    """Keep rates of this machine by which a step of TINY takes a second or two."""
    rates.keep(
        home(),
        rates.Rates(
            rates.kind_of_cpu(), "fp32", 1, workers, 300 << 20, 50 << 20, [[64, 64, 1e9]], [[64, 1e9]], [[64, 1e9]],
            1e9, 1e9, 1e9, [0.0, 0.0, 0.0, 0.0], 1e9, 1e9, 0.0,
        ),
    )  # fmt: skip


def test_measured_rates_give_a_time_and_the_process(plan):
    calibrated()
    found = json.loads(plan(TINY, "--json", "--set", "training.precision=fp32").stdout)
    assert found["rates"].startswith("rates measured on ")
    assert found["step_s"] == pytest.approx(sum(found["step_parts"].values()))
    assert found["duration_s"] == pytest.approx(10 * found["step_s"])
    assert {each["process"] for each in found["memory"]} == {350 << 20}
    said = plan(TINY, "--devices", "2", "--set", "training.precision=fp32").output
    assert "rates are those of 1 at once, not of 2 workers" in said
    assert "a step by rates measured on" in said
    assert "assumed; --mfu" not in said


def test_replicas_are_told_of_known_and_of_measured_devices(plan):
    known = json.loads(plan(SEVENTY, "--device", "h200", "--users", "1000", "--context", "2000", "--json").stdout)
    assert known["serving"]["replicas"]["count"] is None, "70B in bf16 are more than an H200's memory"
    assert known["serving"]["replicas"]["limit"] == "memory"
    assert known["energy_kwh"] == pytest.approx(known["duration_s"] / 3600 * 0.7)
    assert "no number of replicas" in plan(SEVENTY, "--device", "h200", "--users", "1000").output
    assert "no replicas: the bandwidth of this machine is not known" in plan(TINY, "--users", "10").output
    calibrated()
    served = json.loads(plan(TINY, "--users", "10", "--json", "--set", "training.precision=fp32").stdout)["serving"]
    assert served["demand"] == {"users": 10, "tokens_per_second": 20.0, "context": 256}
    assert served["replicas"]["count"] == 1
    assert "rates measured on" in served["by"]


def test_a_plan_needs_a_spec_or_something_to_measure(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tandem", "jobs", "plan"])
    with pytest.raises(SystemExit) as ended:
        tandem.main()
    assert ended.value.code == 2
    assert "name a SPEC, or add --calibrate" in " ".join(capsys.readouterr().err.split())


def test_submit_says_a_line_of_what_it_knows_without_data(plan):
    plan(TINY)
    base = Path.cwd()
    said = at_submit.made(base / "spec.yaml", [])
    assert said.startswith("plan: ")
    assert " GiB for each of 1 worker, ZeRO 1" in said
    assert "tandem jobs plan --calibrate" in said
    rows = TINY.replace("phase: pretrain", "phase: pretrain\ntask: {name: tabular, target_column: y}")
    (base / "rows.yaml").write_text(rows.replace("architecture: llama", "architecture: mlp").split("  config")[0]
                                    + "data: {train: nowhere.txt}\ntraining: {steps: 10}\n")  # fmt: skip
    with pytest.raises(UserError, match="depends on its data"):
        planner.make(specfile.load(base / "rows.yaml", JobSpec), base, planner.Asked(), str, without_data=True)


def test_submit_waits_for_the_line_no_longer_than_so_and_keeps_its_own_priority(plan):
    plan(TINY)
    path, priority = Path.cwd() / "spec.yaml", os.nice(0)
    assert at_submit.said(path, [], patience_s=1e-3) == "plan: not known within 0.001 s; the job's log will say it"
    said = at_submit.said(path, ["training.steps=many"], patience_s=600)
    assert said.startswith("plan: not known: "), "the process has looked"
    assert "training.steps" in said, "with what --set changes"
    assert os.nice(0) == priority
