"""Tasks of a cluster prepare the rows that one process prepares; a job may train on the first while others are made."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jobs import submit
from tests.support.slow_preparation import HERE, ROOT, environment, lay_out, made

pytestmark = pytest.mark.usefixtures("cluster")
TASK = '''
"""The last rows are encoded once the first step is taken: in a job that encodes all before, that would never be."""

import time
from pathlib import Path

from jobs.tasks.text_classification import TextClassification

STEPPED = Path("STEPPED_FILE")


class Late(TextClassification):
    name = "late"

    def encode(self, examples):
        until = time.monotonic() + 120
        while min(example["n"] for example in examples) >= 2200 and not STEPPED.exists():
            assert time.monotonic() < until, "no step was taken before all rows were encoded"
            time.sleep(0.05)
        return super().encode(examples)

    def loss(self, model, batch):
        if model.training:
            STEPPED.touch()
        return super().loss(model, batch)
'''
JOB = {
    "name": "early",
    "phase": "pretrain",
    "task": {"name": "late:Late", "tokenizer": {"train": "word"}},
    "model": {"architecture": "ngram"},
    "data": {"train": "late.jsonl", "eval_fraction": 0.02, "start_early": True},
    "training": {"steps": 12, "global_batch_size": 256, "precision": "fp32"},
    "resources": {"workers": 2},
}


def test_tasks_of_a_cluster_give_what_one_process_gives(tmp_path, monkeypatch):
    lay_out(tmp_path)
    command = [sys.executable, "-m", "tests.support.slow_preparation", str(tmp_path), "cluster", "cluster"]
    found = subprocess.run(command, env=environment(tmp_path), cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert found.returncode == 0, found.stderr
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    assert found.stdout.split() == ["cluster", made(tmp_path, "here", HERE).rows]


def trained(folder: Path, storage: Path) -> tuple[bytes, list[str]]:
    """Run the job; return its weights and its log."""
    (folder / "job.yaml").write_text(yaml.safe_dump(JOB))
    outcome = submit.follow(submit.submit(folder / "job.yaml", []), lambda line, meaning: None)
    assert outcome.status == "SUCCEEDED", "\n".join(outcome.log)
    return (storage / "runs" / outcome.result["run"] / "model" / "model.safetensors").read_bytes(), outcome.log


def test_a_job_that_began_early_ends_with_the_model_of_one_whose_data_was_there(tmp_path, storage):
    (tmp_path / "late.py").write_text(TASK.replace("STEPPED_FILE", str(tmp_path / "stepped")))
    with (tmp_path / "late.jsonl").open("w") as file:
        for n in range(2500):  # lists count for more in memory than here: so there are some twenty chunks
            word = ("good", "bad")[n % 2]
            file.write(json.dumps({"n": n, "text": f"word{n % 97} {word}", "label": word, "more": [0] * 1000}) + "\n")
    early, log = trained(tmp_path, storage)
    assert any("rows held out; training begins as others are encoded" in line for line in log), "\n".join(log)
    late, log = trained(tmp_path, storage)
    assert any("(encoded before)" in line for line in log), "\n".join(log)
    assert early == late
