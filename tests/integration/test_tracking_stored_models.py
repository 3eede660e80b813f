"""Versions whose source is a store's URI: a real MLflow server, moto's S3, and nodes that are homes of their own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cluster import stores, weights_cache
from cluster.errors import UserError
from jobs import parents
from jobs.spec import JobSpec
from serve.deploy import plan
from serve.deploy.model_replica import load_replica
from serve.spec import ServeSpec
from tests.support import moto_server, tiny_models
from tests.support.mlflow_server import MlflowServer
from tests.support.moto_server import MotoServer
from tracking import cli, model_store, outbox, registry
from tracking.client import connect
from tracking.errors import TrackingError

pytest_plugins = ["tests.support.mlflow_server"]
PLACE = "bucket/runs/x/model"


@pytest.fixture
def server(mlflow_server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MotoServer]:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.url)
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(stores, "PAUSE_S", 0.0)
    with moto_server.running(monkeypatch) as server:
        yield server


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_models.language_model(tmp_path / "model", context=256)


def damage(server: MotoServer, key: str, content: bytes) -> None:
    with server.client().open_output_stream(key) as stream:  # type: ignore[attr-defined]
        stream.write(content)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments), env={"COLUMNS": "240"})


def test_a_version_names_the_uri_and_resolves_on_any_node(
    server: MotoServer, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = server.uri(PLACE)
    digest = model_store.put(model, uri)
    version = registry.register("far", uri, run_id="run1", alias="champion")
    assert version.source == uri, "what pyarrow is told of the server stays"
    assert version.stored == (uri, digest)
    assert version.size_bytes == sum(f.stat().st_size for f in model.rglob("*") if f.name != "tandem.json")
    assert version.aliases == ("champion",)
    with pytest.raises(TrackingError, match=r"lies in a store, at s3://bucket/runs/x/model"):
        _ = version.directory
    assert registry.register("far", uri, run_id="run1").version == version.version
    assert registry.register("far", model_store.fetched(uri), run_id="run1").version == version.version
    here = registry.resolve("models:/far@champion")
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "other"))
    there = registry.resolve("models:/far")
    assert there.is_relative_to(tmp_path / "other")
    assert (there / "config.json").read_bytes() == (here / "config.json").read_bytes()
    assert registry.resolve(uri) == there
    listed = json.loads(run("models", "far", "--json").stdout)
    assert [(each["source"], each["size_bytes"]) for each in listed] == [(uri, version.size_bytes)]
    assert "champion" in run("models", "far").stdout


def test_what_was_swapped_in_the_bucket_is_refused(server: MotoServer, model: Path, tmp_path: Path) -> None:
    uri = server.uri(PLACE)
    model_store.put(model, uri)
    version = registry.register("swapped", uri, run_id=None, alias="champion")
    server.client().delete_dir(PLACE)  # type: ignore[attr-defined]
    other = tiny_models.image_classifier(tmp_path / "other-model")
    model_store.put(other, uri)
    shutil.rmtree(tmp_path / "home")
    for call in (
        lambda: registry.resolve(version.uri),
        lambda: registry.promote("swapped", version.version, "next"),
    ):
        with pytest.raises(TrackingError, match=r"s3://bucket/runs/x/model holds another model than was registered"):
            call()
    assert registry.find_version(version.uri).aliases == ("champion",)
    again = registry.register("swapped", uri, run_id=None)
    assert again.version == version.version + 1, "what is there now is another version"
    registry.resolve(again.uri)


def test_an_alias_moves_to_no_damaged_version(server: MotoServer, model: Path) -> None:
    uri = server.uri(PLACE)
    model_store.put(model, uri)
    version = registry.register("rotten", uri, run_id=None)
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    damage(server, f"{PLACE}/model.safetensors", bytes(weights))
    with pytest.raises(UserError, match=r"s3://bucket/runs/x/model/model.safetensors is not what was exported"):
        registry.promote("rotten", version.version, "champion")
    assert registry.find_version(version.uri).aliases == ()


def test_a_source_of_another_tool_and_one_with_a_password_are_refused(server: MotoServer, model: Path) -> None:
    connect().create_registered_model("foreign")
    connect().create_model_version("foreign", "s3://evil/x", await_creation_for=0)
    with pytest.raises(TrackingError, match=r"lies at s3://evil/x, as another tool says"):
        registry.resolve("models:/foreign/1")
    with pytest.raises(UserError, match=r"password") as refused:
        registry.register("secret", "s3://key:hushhush@bucket/model", run_id=None)
    assert "hushhush" not in str(refused.value)
    assert "secret" not in registry.models()


def test_the_command_puts_and_registers(server: MotoServer, model: Path) -> None:
    uri = server.uri("bucket/by-hand")
    done = run("upload", str(model), uri, "--register", "by-hand", "--alias", "champion")
    assert done.exit_code == 0, done.output
    assert "s3://bucket/by-hand holds the model" in done.stdout
    assert "registered models:/by-hand/1" in done.stdout
    assert registry.find_version("models:/by-hand@champion").source == uri


def test_a_version_that_waited_for_the_server_is_one_in_the_store(
    server: MotoServer, model: Path, tmp_path: Path
) -> None:
    uri = server.uri(PLACE)
    model_store.put(model, uri)
    outbox.postpone(tmp_path / "spool", outbox.Version("late", uri, None))
    assert outbox.publish(tmp_path / "spool", "run1") == "models:/late/1"
    assert registry.find_version("models:/late/1").source == uri


@pytest.mark.parametrize("named", ["models:/start@champion", "URI"])
def test_a_job_starts_from_it(server: MotoServer, model: Path, tmp_path: Path, named: str) -> None:
    uri = server.uri(PLACE)
    model_store.put(model, uri)
    registry.register("start", uri, run_id=None, alias="champion")
    source = uri if named == "URI" else named
    spec = JobSpec.model_validate(
        {
            "name": "next",
            "phase": "finetune",
            "task": {"name": "causal-lm"},
            "model": {"from": source},
            "data": {"train": "builtin:shapes"},
            "training": {"epochs": 1},
        }
    )
    said: list[str] = []
    assert parents.preflight(spec, tmp_path, unchecked=said.append) is None
    assert len(said) == 1
    assert "not looked at" in said[0]
    folder = parents.find(spec, tmp_path)
    assert isinstance(folder, Path)
    assert model_store.portable(folder).startswith(uri)
    damage(server, f"{PLACE}/model.safetensors", b"short")
    with pytest.raises(UserError, match=r"s3://bucket/runs/x/model/model.safetensors is not what was exported"):
        parents.find(spec, tmp_path)


@pytest.mark.parametrize("named", ["models:/served@champion", "URI"])
def test_a_replica_fetches_on_its_own_node(
    server: MotoServer, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    uri = server.uri(PLACE)
    model_store.put(model, uri)
    registry.register("served", uri, run_id=None, alias="champion")
    spec = ServeSpec.model_validate({"models": {"lm": {"model": uri if named == "URI" else named}}})
    (planned,) = plan.resolve(plan.absolute(spec, tmp_path))
    shutil.rmtree(tmp_path / "home")
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "replica"))
    assert str(tmp_path) not in planned.directory
    assert "127.0.0.1" not in json.dumps(planned.details)
    assert not model_store.is_here(planned.directory)
    replica = load_replica(planned)
    assert replica.describe()
    assert model_store.is_here(planned.directory)
    blobs = list((tmp_path / "replica" / "cache" / "weights").glob("*.safetensors"))
    assert len(blobs) == 1
    shutil.rmtree(tmp_path / "replica")
    damage(server, f"{PLACE}/config.json", b"{}")
    with pytest.raises(UserError, match=r"s3://bucket/runs/x/model/config.json is not what was put there"):
        load_replica(planned)


def test_weights_of_a_registered_model_are_those_that_were_put(server: MotoServer, model: Path) -> None:
    uri = server.uri(PLACE)
    model_store.put(model, uri)
    version = registry.register("whole", uri, run_id=None)
    folder = weights_cache.local(registry.resolve(version.uri))
    assert (folder / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
