"""What `validate` finds out about the model a job starts from, and what it says it cannot."""

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
from jobs.tasks.causal_lm import CausalLM
from jobs.tasks.text_classification import TextClassification
from tests.support.mlflow_server import free_port


def spec(source: str, config: dict[str, Any] | None = None, task: str = "causal-lm") -> JobSpec:
    values = {"name": "x", "phase": "finetune", "task": task, "model": {"from": source, "config": config or {}}}
    return JobSpec.model_validate({**values, "data": {"train": "absent.txt"}, "training": {"steps": 1}})


def folder(path: Path, **config: Any) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    save_file({}, path / "model.safetensors")
    return path


def test_a_registry_that_is_away_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "home"))
    (tmp_path / "absent.txt").write_text("here it is")
    (tmp_path / "spec.yaml").write_text(json.dumps(spec("models:/m/1").resolved()))

    def said() -> str:
        done = CliRunner().invoke(cli.app, ["validate", str(tmp_path / "spec.yaml")])
        assert done.exit_code == 0, done.exception
        return done.stderr

    left = "so whether models:/m/1 exists, is quantised or fits model.config was not checked\n"
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert said() == f"note: model.from: no registry is known here (MLFLOW_TRACKING_URI, or a running cluster), {left}"
    address = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    assert said() == f"note: model.from: the registry at {address} does not answer, {left}"


@pytest.mark.parametrize(
    ("task", "config", "said"),
    [
        ("causal-lm", {"hiden_size": 8}, r"llama has no 'hiden_size'; did you mean 'hidden_size'"),
        ("causal-lm", {"hidden_size": "wide"}, r"model.config for .*'hidden_size'"),
        ("text-classification", {"hiden_size": 8}, r"llama has no 'hiden_size'"),
        ("image-classification", {}, "is a llama, which is no image-classifying architecture"),
    ],
)
def test_entries_of_model_config_are_held_against_a_folder(
    task: str, config: dict[str, Any], said: str, tmp_path: Path
) -> None:
    folder(tmp_path / "parent", model_type="llama")
    for look in (parents.preflight, parents.find):
        with pytest.raises(UserError, match=said):
            look(spec("./parent", config, task), tmp_path)


def test_entries_that_fit_are_taken(tmp_path: Path) -> None:
    folder(tmp_path / "parent", model_type="llama")
    assert parents.find(spec("./parent", {"attention_dropout": 0.5}), tmp_path) == tmp_path / "parent"


def test_rows_that_are_longer_than_the_parents_positions_are_refused(tmp_path: Path) -> None:
    folder(tmp_path / "parent", model_type="llama", max_position_embeddings=128)
    with pytest.raises(UserError, match=r"task\.sequence_length is 256, but the model has 128 positions"):
        parents.preflight(spec("./parent"), tmp_path)
    assert parents.preflight(spec("./parent", {"max_position_embeddings": 256}), tmp_path) is None


def test_damaged_weights_are_refused_before_the_job(tmp_path: Path) -> None:
    parent = folder(tmp_path / "parent", model_type="llama")
    (parent / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    for look in (parents.preflight, parents.find):
        with pytest.raises(UserError, match=r"model.from: ./parent: .*is no whole safetensors file"):
            look(spec("./parent"), tmp_path)


@pytest.mark.parametrize(
    ("task", "architecture", "said"),
    [
        (CausalLM, "gemma3", r"is made of several models \(text_config, vision_config\).*'gemma3_text'"),
        (CausalLM, "mllama", r"is made of several models"),
        (CausalLM, "musicgen", r"is made of several models \(audio_encoder, decoder, text_encoder\)"),
        (CausalLM, "t5", "'t5' is no causal architecture"),
        (CausalLM, "dbrx", "dbrx cannot be built with this model.config: AttributeError"),
        (CausalLM, "gemma4_assistant", "gemma4_assistant has no config of its own"),
        (TextClassification, "qwen3_5", r"several models .*'qwen3_5_text'"),
    ],
)
def test_architectures_that_make_no_model_are_refused(task: Any, architecture: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        task().check_model(architecture, {})


def test_values_that_make_no_model_are_refused() -> None:
    with pytest.raises(UserError, match=r"llama cannot be built with this model.config|model.config for llama"):
        CausalLM().check_model("llama", {"hidden_size": 30, "num_attention_heads": 4, "num_hidden_layers": -1})
    CausalLM().check_model("llama", {"hidden_size": 32, "num_attention_heads": 4})


def test_validate_lists_what_is_wrong_with_data_and_model_at_once(tmp_path: Path) -> None:
    (tmp_path / "notes.pdf").write_bytes(b"%PDF")
    data = {"train": ["absent.jsonl", "notes.pdf"], "eval": "https://host/x.jsonl"}
    model = {"architecture": "llama", "config": {"hiden_size": 8}}
    written = {"name": "x", "phase": "pretrain", "task": "causal-lm", "training": {"steps": 1}}
    (tmp_path / "spec.yaml").write_text(json.dumps({**written, "model": model, "data": data}))
    done = CliRunner().invoke(cli.app, ["validate", str(tmp_path / "spec.yaml")])
    assert isinstance(done.exception, UserError)
    wrong = str(done.exception).splitlines()
    assert [said in line for said, line in zip(["'hiden_size'", "notes.pdf has", "https://"], wrong, strict=True)] == (
        [True] * 3
    )


def test_validate_says_what_data_is_not_here(tmp_path: Path) -> None:
    model = {"architecture": "llama", "config": {}}
    written = {"name": "x", "phase": "pretrain", "task": "causal-lm", "training": {"steps": 1}, "model": model}
    (tmp_path / "spec.yaml").write_text(json.dumps({**written, "data": {"train": "absent.jsonl"}}))
    done = CliRunner().invoke(cli.app, ["validate", str(tmp_path / "spec.yaml")])
    assert done.exit_code == 0, done.exception
    left = f"nothing matches 'absent.jsonl' on this machine (looked from {tmp_path}), so it was not looked at"
    assert done.stderr == f"note: data.train: {left}\n"


def test_weights_without_a_config_are_no_model(tmp_path):
    (tmp_path / "weights").mkdir()
    save_file({}, tmp_path / "weights/model.safetensors")
    with pytest.raises(UserError, match=r"model\.from: weights holds weights, and no config\.json"):
        parents.preflight(spec("weights"), tmp_path)
