"""A task and an engine of the user's own, beside the specs: trained, served, changed, and missed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from typer.testing import CliRunner, Result

from cluster.connect import Connection
from jobs import submit
from serve import cli
from tests.support import own_engine
from tests.support.members import named

TASK = '''
"""Images of digits, told apart as even and odd."""

import json
from pathlib import Path

from jobs.tasks.image_classification import ImageClassification

WORDS = json.loads((Path(__file__).parent / "words.json").read_text())


class Parity(ImageClassification):
    name = "my_parity:Parity"

    def predict(self, model, instances):
        answers = super().predict(model, instances)
        return [{"parity": WORDS[int(answer["label"]) % 2], "label": answer["label"]} for answer in answers]
'''
JOB = {
    "name": "parity",
    "phase": "pretrain",
    "task": "my_parity:Parity",
    "model": {"architecture": "cnn", "config": {"width": 8, "hidden_size": 8}},
    "data": {"train": "sklearn-digits", "max_examples": 200},
    "training": {"steps": 5, "global_batch_size": 32, "precision": "fp32"},
    "register": {"model": "parity", "alias": "champion"},
}
SERVE: dict[str, Any] = {
    "models": {
        "parity": {"model": "models:/parity@champion", "resources": {"cpus_per_replica": 0.5}},
        "bright": {
            "model": "models:/parity@champion",
            "engine": {"name": "my_engine:ENGINE", "threshold": 99},
            "resources": {"cpus_per_replica": 0.5},
        },
    },
    "drain_s": 5,
    "start_timeout_s": 180,
}
IMAGES = {"name": "image", "shape": [2, 8, 8, 1], "datatype": "UINT8", "data": [100] * 64 + [98] * 64}


def up(folder: Path, spec: dict[str, Any] = SERVE) -> Result:
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump(spec))
    return CliRunner().invoke(cli.app, ["up", str(path), "--json"])


@pytest.fixture(scope="module")
def trained(cluster: Connection, folder: Path) -> Iterator[Path]:
    """The folder of the specs and the code, when a model of the own task has been trained and registered."""
    (folder / "my_parity.py").write_text(TASK)
    own_engine.write(folder)
    (folder / "words.json").write_text('["even", "odd"]')
    job = folder / "job.yaml"
    job.write_text(yaml.safe_dump(JOB))
    outcome = submit.follow(submit.submit(job, []), lambda line, meaning: None)
    assert outcome.status == "SUCCEEDED", "\n".join(outcome.log)
    yield folder
    CliRunner().invoke(cli.app, ["down"])


def test_without_its_code_nothing_is_deployed(trained: Path, tmp_path: Path) -> None:
    only = {**SERVE, "models": {"parity": SERVE["models"]["parity"]}}
    done = up(tmp_path, only)
    assert getattr(done.exception, "exit_code", None) == 2
    said = str(done.exception)
    assert "models.parity: its task 'my_parity:Parity' is code of your own" in said
    assert f"{tmp_path} has no my_parity.py or my_parity/" in said
    assert "nothing is served" in CliRunner().invoke(cli.app, ["status"]).output


def test_a_trained_task_and_an_engine_of_ones_own_answer(trained: Path) -> None:
    done = up(trained)
    assert done.exit_code == 0, done.output
    endpoint = json.loads(done.stdout)["endpoint"]
    parity = ask(endpoint, "parity")
    assert set(parity["parity"]) <= {"even", "odd"}
    words = {"0": "even", "1": "odd"}
    assert parity["parity"] == [words[str(int(label) % 2)] for label in parity["label"]]
    assert ask(endpoint, "bright")["bright"] == [64, 0]
    replicas = named("ray::ServeReplica:tandem.")
    forked = [p for p in replicas if (parent := p.parent()) and "cluster.fork_server" in parent.cmdline()]
    assert len(forked) == len(replicas) >= 2


def test_replicas_are_replaced_when_the_code_changes_and_only_then(trained: Path) -> None:
    first = serving()
    scaled = {
        name: {**model, "replicas": {"min": 1, "max": 2}, "downscale_delay_s": 7}
        for name, model in SERVE["models"].items()
    }
    assert up(trained, {**SERVE, "models": scaled}).exit_code == 0
    assert serving() == first
    (trained / "words.json").write_text('["EVEN", "ODD"]')
    done = up(trained, {**SERVE, "models": scaled})
    assert done.exit_code == 0, done.output
    assert set(ask(json.loads(done.stdout)["endpoint"], "parity")["parity"]) <= {"EVEN", "ODD"}


def ask(endpoint: str, model: str) -> dict[str, list[Any]]:
    answer = httpx.post(f"{endpoint}/v2/models/{model}/infer", json={"inputs": [IMAGES]}, timeout=60)
    assert answer.status_code == 200, answer.text
    return {output["name"]: output["data"] for output in answer.json()["outputs"]}


def serving() -> set[int]:
    return {process.pid for process in named("ray::ServeReplica:tandem.")}
