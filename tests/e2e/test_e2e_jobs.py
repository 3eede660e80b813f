"""Jobs on the real stack: Ray Jobs → Ray Train → DeepSpeed → MLflow, from pre-training to the int8 child."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from cluster import home
from cluster.errors import UserError
from cluster.precision import resolve, this_cpu
from jobs import submit
from jobs.submit import Outcome

pytestmark = pytest.mark.usefixtures("cluster")
ROOT = Path(__file__).parents[2]

SPEC = {
    "name": "tiny",
    "phase": "pretrain",
    "model": {
        "architecture": "llama",
        "config": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "tie_word_embeddings": True,
        },
    },
    "data": {
        "train": "python-stdlib",
        "max_examples": 40,
        "eval_fraction": 0.1,
        "eval_max_rows": 16,
        "sequence_length": 64,
        "tokenizer": {"train": "bpe", "vocab_size": 512},
    },
    "training": {"steps": 30, "global_batch_size": 7, "learning_rate": 3e-3, "precision": "fp32"},
}


def run(folder: Path, spec: dict, *overrides: str) -> Outcome:
    path = folder / f"{spec['name']}.yaml"
    path.write_text(yaml.safe_dump(spec))
    return submit.follow(submit.submit(path, list(overrides)), lambda line, meaning: None)


def finished(outcome: Outcome) -> dict:
    assert outcome.status == "SUCCEEDED", "\n".join(outcome.log)
    return outcome.result


def history(run_id: str, key: str) -> list[tuple[int, float]]:
    from mlflow.tracking import MlflowClient

    from cluster.connect import connection

    points = MlflowClient(connection().tracking_uri).get_metric_history(run_id, key)
    return sorted((point.step, point.value) for point in points)


def mlflow_run(run_id: str):
    from mlflow.tracking import MlflowClient

    from cluster.connect import connection

    return MlflowClient(connection().tracking_uri).get_run(run_id)


def logged_models(found) -> list[int]:
    from mlflow.tracking import MlflowClient

    from cluster.connect import connection

    client = MlflowClient(connection().tracking_uri)
    models = client.search_logged_models(
        [found.info.experiment_id], filter_string=f"source_run_id = '{found.info.run_id}'"
    )
    return sorted(int(model.tags["tandem.checkpoint"]) for model in models)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("specs")


@pytest.fixture(scope="module")
def pretrained(cluster, folder):
    """One worker, ZeRO 0, all rows at once, as `auto` has it: what every other way of running must reproduce."""
    spec = {
        **SPEC,
        "register": {"model": "jobs-tiny", "alias": "candidate"},
        "checkpoint": {"every_steps": 10, "keep": 2},
    }
    settings = ["training.deepspeed.zero_stage=auto", "training.micro_batch_size=auto"]
    outcome = run(folder, spec, *settings)
    said = "\n".join(outcome.log)
    assert "zero_stage auto: ZeRO stage 0: the lowest whose peak is within what a worker has" in said
    assert "micro_batch_size auto: all 7 rows of a worker in one pass" in said
    return finished(outcome)


def test_a_run_holds_what_happened(pretrained):
    found = mlflow_run(pretrained["run_id"])
    assert found.info.status == "FINISHED"
    assert found.data.params["training.steps"] == "30"
    assert found.data.params["training.deepspeed.zero_stage"] == "0"
    assert found.data.params["training.micro_batch_size"] == "7"
    assert found.data.tags["tandem.code_version"]
    assert found.data.tags["tandem.dataset.train"].startswith("python-stdlib@")
    assert [step for step, _ in history(pretrained["run_id"], "loss")] == list(range(1, 31))
    rates = ("tokens_per_second", "model_flops_per_second")
    for key in ("learning_rate", "gradient_norm", "step_time_s", "data_wait_s", *rates):
        assert len(history(pretrained["run_id"], key)) == 30, key
    parts = [history(pretrained["run_id"], f"{part}_s") for part in ("forward", "backward", "loss_sum", "optimizer")]
    for (_, whole), *each in zip(history(pretrained["run_id"], "step_time_s"), *parts, strict=True):
        assert 0 < sum(value for _, value in each) <= whole
    assert max(value for _, value in history(pretrained["run_id"], "peak_memory_bytes/rank-0")) > 100 << 20
    assert [step for step, _ in history(pretrained["run_id"], "eval_loss")] == [0, 30]
    assert logged_models(found) == [20, 30], "the kept checkpoints are logged models, the removed one is not"


def test_workers_are_forked_from_a_process_that_has_imported(pretrained):
    logs = home.home() / "ray" / "session_latest" / "logs"
    assert len(list(logs.glob("forkserver-*.log"))) == 1
    assert not [path.name for path in logs.glob("worker-*.err") if "no fork server" in path.read_text()]


def test_the_held_out_loss_falls(pretrained):
    evaluations = pretrained["evaluations"]
    assert evaluations["final"]["loss"] < 0.95 * evaluations["first"]["loss"]


def test_two_zero_3_workers_give_the_losses_of_one_without_zero(pretrained, folder):
    settings = ["training.deepspeed.zero_stage=3", "resources.workers=2", "training.micro_batch_size=3"]
    other = finished(run(folder, {**SPEC, "name": "tiny-2"}, *settings))
    expected, got = history(pretrained["run_id"], "loss"), history(other["run_id"], "loss")
    assert len(got) == 30
    assert [value for _, value in got] == pytest.approx([value for _, value in expected], rel=1e-4)


def test_transformers_loads_the_weights_and_the_manifest_describes_them(pretrained):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tracking import manifest, registry

    directory = registry.resolve("models:/jobs-tiny@candidate")
    assert str(directory) == pretrained["directory"]
    contract = manifest.read(directory, verify=True)
    assert (contract.task, contract.architecture, contract.run_id) == ("causal-lm", "llama", pretrained["run_id"])
    assert contract.evaluation == pytest.approx(pretrained["evaluations"]["final"])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    ids = tokenizer("import os", return_tensors="pt")["input_ids"]
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] == ids.shape[1] + 4


def test_fine_tune_evaluate_and_quantise_from_the_registry(pretrained, folder):
    data = {"train": "python-stdlib-docstrings", "max_examples": 400, "eval_fraction": 0.1, "sequence_length": 128}
    tuned = finished(
        run(
            folder,
            {
                "name": "tiny-chat",
                "phase": "finetune",
                "model": {
                    "from": "models:/jobs-tiny@candidate",
                    "lora": {"rank": 8},
                    "config": {"max_position_embeddings": 128},
                },
                "data": data,
                "training": {"epochs": 2, "global_batch_size": 8, "learning_rate": 5e-3},
                "resources": {"workers": 2},
                "register": {"model": "jobs-tiny-chat", "alias": "candidate"},
            },
        )
    )
    assert tuned["evaluations"]["final"]["loss"] < tuned["evaluations"]["first"]["loss"]
    source = {"model": {"from": "models:/jobs-tiny-chat@candidate"}, "data": data}
    measured = finished(run(folder, {"name": "measure", "phase": "evaluate", "resources": {"workers": 2}, **source}))
    assert measured["evaluation"]["loss"] == pytest.approx(tuned["evaluations"]["final"]["loss"], rel=1e-2)
    shrunk = finished(
        run(
            folder,
            {"name": "shrink", "phase": "quantize", "register": {"model": "jobs-tiny-chat", "alias": "int8"}, **source},
        )
    )
    cost = shrunk["quantization"]
    assert cost["bytes"] < cost["parent_bytes"]
    assert abs(cost["loss_change"]) < 0.02
    assert shrunk["model"] == "models:/jobs-tiny-chat/2"
    assert_all_say_what_they_computed_in(
        {"training": tuned, "evaluate": measured, "quantize": shrunk}, resolve("auto", [this_cpu()])
    )


def assert_all_say_what_they_computed_in(made: dict[str, dict], precision: str) -> None:
    """In the run's params and log, and where the job left a model in its manifest."""
    from tracking import manifest

    decided = [re.findall(r"precision (\w+): ", submit.logs(job["id"])) for job in submit.list_jobs()]
    assert decided[: len(made)] == [[precision]] * len(made), "each job says it once"
    for section, result in made.items():
        assert mlflow_run(result["run_id"]).data.params[f"{section}.precision"] == precision
        if "directory" in result:
            assert manifest.read(Path(result["directory"])).precision == precision


def test_digits_are_recognised(cluster):
    path = ROOT / "jobs" / "specs" / "digits.yaml"
    job = submit.submit(path, ["resources.workers=3"])  # 64 images a step do not divide by three
    result = finished(submit.follow(job, lambda line, meaning: None))
    assert result["evaluations"]["final"]["accuracy"] >= 0.97


MIXTURE = [{"name": "many", "train": "many.jsonl", "weight": 7}, {"name": "few", "train": "few.jsonl", "weight": 3}]


def test_a_stopped_job_goes_on_where_it_was(folder):
    """And so does what it has learned from each of the sources that it mixes."""
    for name, count in (("many", 60), ("few", 20)):
        texts = [f"{name} {at}: " + " ".join(str(at * k % 89) for k in range(9, 90)) for at in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    data = {key: value for key, value in SPEC["data"].items() if key not in ("train", "max_examples")}
    path = folder / "long.yaml"
    values = {**SPEC, "name": "long", "training": {**SPEC["training"], "steps": 800}}
    path.write_text(yaml.safe_dump({**values, "data": {**data, "mixture": MIXTURE}}))
    first = submit.submit(path, [])
    while "tandem: evaluate 0" not in submit.logs(first):
        assert submit.known(first) not in submit.TERMINAL, submit.logs(first)
        time.sleep(0.2)
    assert_ctrl_c_detaches(first)
    assert submit.stop(first)
    assert submit.follow(first, lambda line, meaning: None).status == submit.list_jobs()[0]["status"] == "STOPPED"
    result = finished(submit.follow(submit.submit(path, []), lambda line, meaning: None))
    assert "goes on" in submit.logs(submit.list_jobs()[0]["id"])
    assert [step for step, _ in history(result["run_id"], "loss")] == list(range(1, 801))
    found, said = mlflow_run(result["run_id"]), submit.logs(submit.list_jobs()[0]["id"])
    assert found.info.status == "FINISHED"
    assert (found.data.params["mixture.many.share"], found.data.params["mixture.few.share"]) == ("0.7", "0.3")
    shares = history(result["run_id"], "share_of_rows/many")
    assert [step for step, _ in shares] == list(range(50, 801, 50))
    assert all(abs(share * 7 * step - 0.7 * 7 * step) < 3.5 for step, share in shares)
    assert abs(shares[-1][1] - 0.7) < 1e-9, "5,600 rows are whole blocks and whole shares, before the stop and after"
    assert "source few: 30 % of rows, " in said
    many, few, both = (history(result["run_id"], f"eval_loss{of}") for of in ("/many", "/few", ""))
    for (step, one), (of_few, other), (of_both, loss) in zip(many, few, both, strict=True):
        assert step == of_few == of_both
        assert min(one, other) < loss < max(one, other)
    assert result["evaluations"]["final"]["loss/few"] == few[-1][1]
    assert "learned from each source, of all rows (of all terms of the loss): many 70 % (" in said


def assert_ctrl_c_detaches(job: str) -> None:
    """Follow in a process of its own, interrupt it, and see that the job goes on."""
    code = "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    command = [sys.executable, "-c", code, str(ROOT / "tandem.py"), "jobs", "logs", job, "--follow"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if "evaluat" in line:
            break
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=30)
    assert process.returncode == 130, rest
    assert f"detached; the job goes on. Come back: tandem jobs logs {job} --follow" in rest
    assert submit.known(job) == "RUNNING"


def test_a_user_error_fails_the_job_with_one_clear_line(folder):
    outcome = run(folder, {**SPEC, "name": "wrong"}, "resources.workers=64")
    assert outcome.status == submit.list_jobs()[0]["status"] == "FAILED"
    assert outcome.error is not None
    assert "64 workers" in outcome.error
    assert "Traceback" not in "\n".join(outcome.log)


def test_a_parent_that_does_not_exist_is_refused_at_submission(folder):
    data = {key: value for key, value in SPEC["data"].items() if key != "tokenizer"}
    with pytest.raises(UserError, match="no registered model 'nope'"):
        run(folder, {**SPEC, "name": "orphan", "data": data}, "model={from: models:/nope@x}")


def test_folders_with_the_names_of_ours_beside_the_spec_hide_nothing(tmp_path):
    files = {
        "jobs/__init__.py": "raise ImportError('not this one')",
        "jobs/own_notes.py": "",
        "cluster/notes.txt": "",
        "serve/__init__.py": "raise ImportError('not this one')",
        "tracking/data.csv": "a,b",
        "tracking.py": "raise ImportError('not this one')",
        "mine/losses.py": "NAME = 'mine'",
        "my_task.py": "from jobs.tasks.causal_lm import CausalLM\nfrom mine.losses import NAME\n\n\n"
        "class Mine(CausalLM):\n    unit = NAME\n",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    spec = {**SPEC, "name": "beside", "task": "my_task:Mine", "training": {**SPEC["training"], "steps": 3}}
    result = finished(run(tmp_path, spec, "resources.workers=2", "training.deepspeed.zero_stage=3"))
    assert len(history(result["run_id"], "mine_per_second")) == 3, "the task of the user's own was used"
    with pytest.raises(UserError, match="rename"):
        submit.submit(tmp_path / "beside.yaml", ["task=jobs.own_notes:Mine"])


def test_command_line_exit_codes(pretrained, folder):
    (folder / "typo.yaml").write_text(yaml.safe_dump({**SPEC, "trainig": {}}))
    typo = tandem("jobs", "submit", str(folder / "typo.yaml"))
    assert typo.returncode == 2
    assert "did you mean `training`" in typo.stderr
    assert tandem("jobs", "logs", "nothing-like-it").returncode == 2
    failed = tandem("jobs", "submit", str(folder / "tiny.yaml"), "--follow", "--set", "data.train=none.txt")
    assert failed.returncode == 2
    assert "none.txt" in failed.stdout + failed.stderr
    listed = json.loads(tandem("jobs", "list", "--json").stdout)
    assert listed == submit.list_jobs()
    assert "SUCCEEDED" in {job["status"] for job in listed if job["name"] == "tiny"}, "that of `pretrained`"


def tandem(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "tandem.py"), *arguments], capture_output=True, text=True, check=False
    )
