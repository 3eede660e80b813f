"""The model that a job starts from is refused before the job starts, on a real registry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from typer.testing import CliRunner

from cluster.errors import UserError
from jobs import cli, parents
from jobs.spec import JobSpec
from tests.support.mlflow_server import MlflowServer
from tracking import manifest, registry

pytest_plugins = ["tests.support.mlflow_server"]


@pytest.fixture(autouse=True)
def _tracking_uri(mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.url)


def registered(name: str, folder: Path, quantization: dict[str, Any] | None) -> registry.ModelVersion:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file({}, folder / "model.safetensors")
    about = manifest.ModelManifest(name=name, task="causal-lm", architecture="llama", quantization=quantization)
    manifest.write(folder, about)
    return registry.register(name, folder, run_id=None)


def spec(phase: str, source: str) -> JobSpec:
    values = {"name": "x", "phase": phase, "model": {"from": source}, "data": {"train": "a.txt"}}
    return JobSpec.model_validate({**values, "training": {"steps": 1}} if phase == "finetune" else values)


@pytest.mark.parametrize("phase", ["finetune", "quantize"])
def test_a_quantised_version_is_refused_and_the_whole_one_named(phase: str, tmp_path: Path) -> None:
    name = f"l-{phase}"
    whole = registered(name, tmp_path / "whole", None)
    registered(name, tmp_path / "int8", {"method": "int8-weight-only"})
    said = f"models:/{name} is version 2, int8-weight-only, .* choose version 1 \\(models:/{name}/1\\)"
    with pytest.raises(UserError, match=said) as refused:
        parents.find(spec(phase, f"models:/{name}"), tmp_path)
    assert refused.value.exit_code == 2
    with pytest.raises(UserError, match=said):
        parents.preflight(spec(phase, f"models:/{name}"), tmp_path)
    with pytest.raises(UserError, match=r"is quantised \(int8-weight-only\)"):
        parents.find(spec(phase, str(tmp_path / "int8")), tmp_path)
    assert parents.find(spec(phase, whole.uri), tmp_path) == tmp_path / "whole"
    assert parents.find(spec("evaluate", f"models:/{name}"), tmp_path) == tmp_path / "int8"


def test_validate_asks_the_registry(tmp_path: Path) -> None:
    registered("only-int8", tmp_path / "int8", {"method": "int8-weight-only"})
    path = tmp_path / "spec.yaml"

    def validated(source: str) -> Any:
        path.write_text(json.dumps(spec("quantize", source).resolved()))
        return CliRunner().invoke(cli.app, ["validate", str(path)])

    refused = validated("models:/only-int8")
    assert isinstance(refused.exception, UserError)
    assert "no version of it is in full precision" in str(refused.exception)
    later = validated("models:/not-there-yet")
    assert later.exit_code == 0
    assert "no registered model 'not-there-yet'" in later.stderr
    assert isinstance(validated("models:/a/b").exception, UserError)
    assert isinstance(validated("models:/a@v3").exception, UserError)


def test_a_folder_with_code_of_its_own_is_refused_where_it_lies(tmp_path: Path) -> None:
    folder = tmp_path / "parent"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}))
    for look in (parents.find, parents.preflight):
        with pytest.raises(UserError, match=r"config\.json has `auto_map`"):
            look(spec("finetune", "./parent"), tmp_path)
    assert "no model directory" in (parents.preflight(spec("finetune", "./absent"), tmp_path) or "")


OWN = """
from jobs.tasks import Task, TaskSetupError

class Picky(Task):
    name = "picky"

    def encode(self, examples):
        if "messages" in examples[0]:
            raise TaskSetupError("the tokenizer has no chat template: give one")
        raise KeyError("an example's own fault")
"""


@pytest.mark.parametrize(("row", "said"), [({"messages": []}, "no chat template"), ({"text": "a"}, "")])
def test_validate_tries_the_first_examples_with_the_parent(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "picky.py").write_text(OWN)
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    (tmp_path / "parent").mkdir()
    values = spec("finetune", "./parent").resolved() | {"task": "picky:Picky", "data": {"train": "a.jsonl"}}
    (tmp_path / "spec.yaml").write_text(json.dumps(values))
    done = CliRunner().invoke(cli.app, ["validate", str(tmp_path / "spec.yaml")])
    if said:
        assert isinstance(done.exception, UserError)
        assert said in str(done.exception)
    else:
        assert done.exit_code == 0, done.exception
