"""Model versions on a real MLflow server, from Python and from the command line."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cluster.errors import UserError
from tests.support.mlflow_server import LossyProxy, MlflowServer, free_port
from tracking import cli, manifest, registry, weights_digest
from tracking.errors import TrackingError
from tracking.run import Run

pytest_plugins = ["tests.support.mlflow_server"]


@pytest.fixture(autouse=True)
def _tracking_uri(mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.url)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """An exported model in a directory whose name needs quoting in a URI."""
    directory = tmp_path / "my model+v1%20"
    directory.mkdir()
    (directory / "model.safetensors").write_bytes(b"0" * 2000)
    contract = manifest.ModelManifest(
        name="lm", task="causal-lm", architecture="llama", evaluation={"loss": 1.5}, quantization={"method": "int8"}
    )
    contract = contract.model_copy(update={"base": manifest.BaseRef(reference="models:/base/3", digest="d" * 64)})
    manifest.write(directory, contract)
    return directory


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments), env={"COLUMNS": "200"})


def test_a_registered_directory_resolves_by_version_alias_and_name(model: Path) -> None:
    version = registry.register("lm", model, run_id="run1", alias="candidate")
    assert version.uri == f"models:/lm/{version.version}"
    assert version.aliases == ("candidate",)
    assert (version.size_bytes, version.evaluation, version.quantization) == (2000, {"loss": 1.5}, "int8")
    assert version.base == "models:/base/3"
    for uri in (version.uri, "models:/lm@candidate", "models:/lm", "models:/lm/latest", str(model)):
        assert registry.resolve(uri) == model


def test_registering_again_is_the_same_version_and_another_run_the_next(model: Path) -> None:
    first = registry.register("twice", model, run_id="run1")
    assert registry.register("twice", model, run_id="run1").version == first.version
    assert registry.register("twice", model, run_id="run2").version == first.version + 1
    assert [version.version for version in registry.versions("twice")] == [2, 1]


def test_a_lost_reply_makes_one_version(mlflow_server: MlflowServer, model: Path) -> None:
    with LossyProxy(mlflow_server, lose="/model-versions/create") as proxy:
        version = registry.register("lossy", model, run_id="run1", tracking_uri=proxy.url)
    assert len(proxy.lost) == 1
    assert [found.version for found in registry.versions("lossy")] == [version.version]


def test_an_alias_moves_from_version_to_version(model: Path) -> None:
    for run_id in ("run1", "run2"):
        registry.register("moving", model, run_id=run_id)
    registry.promote("moving", 1, "champion")
    assert registry.find_version("models:/moving@champion").version == 1
    promoted = registry.promote("moving", 2, "champion")
    assert promoted.aliases == ("champion",)
    assert registry.find_version("models:/moving@champion").run_id == "run2"
    assert registry.find_version("models:/moving/1").aliases == ()


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("models:/knwon", r"no registered model 'knwon': did you mean 'known'\?"),
        ("models:/known@champoin", r"no alias 'champoin': did you mean 'champion'\?"),
        ("models:/known/7", r"no version 7: the newest is \d"),
        ("models:/known@3", "alias '3' reads like a version"),
        ("models:/known/x", "is no model URI"),
        ("models:/a%2fb", "not a valid name"),
        ("models:/../x", "not a valid name"),
        ("/no/such/directory", "no model directory at /no/such/directory"),
    ],
)
def test_what_does_not_resolve_says_why(model: Path, uri: str, message: str) -> None:
    registry.register("known", model, run_id=None, alias="champion")
    with pytest.raises(UserError, match=message):
        registry.resolve(uri)


def test_a_version_whose_files_are_elsewhere_says_where(model: Path) -> None:
    registry.register("moved", model, run_id=None)
    model.rename(model.with_name("other"))
    with pytest.raises(TrackingError, match=r"in .*my model\+v1%20, which this machine does not have"):
        registry.resolve("models:/moved")


def test_a_damaged_model_is_not_registered(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"short")
    with pytest.raises(TrackingError, match="has 5 bytes"):
        registry.register("damaged", model, run_id=None)
    assert "damaged" not in registry.models()


def test_an_alias_does_not_move_to_a_damaged_version(model: Path) -> None:
    first = registry.register("rotten", model, run_id="run1", alias="champion")
    second = registry.register("rotten", model, run_id="run2")
    (model / "model.safetensors").write_bytes(b"0" * 1999 + b"1")
    with pytest.raises(TrackingError, match="is corrupt"):
        registry.promote("rotten", second.version, "champion")
    assert registry.find_version("models:/rotten@champion").version == first.version


def test_an_alias_does_not_move_to_adapters_whose_base_is_another_one(model: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    (base / "model.safetensors").write_bytes(b"1" * 100)
    (model / "adapter_config.json").write_text("{}")
    (model / "base.json").write_text(json.dumps({"at": str(base), "digest": weights_digest.of_folder(base)}))
    manifest.write(model, manifest.read(model))
    first = registry.register("adapters", model, run_id="run1", alias="champion")
    second = registry.register("adapters", model, run_id="run2")
    (base / "model.safetensors").write_bytes(b"1" * 99 + b"2")
    with pytest.raises(TrackingError, match="whose weights have changed since"):
        registry.promote("adapters", second.version, "champion")
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(TrackingError, match="which is not there"):
        registry.promote("adapters", second.version, "champion")
    assert registry.find_version("models:/adapters@champion").version == first.version
    (tmp_path / "elsewhere").rename(base)
    (base / "model.safetensors").write_bytes(b"1" * 100)
    assert registry.promote("adapters", second.version, "champion").aliases == ("champion",)


def test_the_models_table_and_its_json(model: Path) -> None:
    registry.register("shown", model, run_id="run1", alias="candidate")
    table = run("models", "shown")
    assert table.exit_code == 0
    assert table.stdout.splitlines()[1].split()[:5] == ["shown", "1", "candidate", "2.0", "kB"]
    assert "loss 1.5" in table.stdout
    assert "int8" in table.stdout
    (record,) = json.loads(run("models", "shown", "--json").stdout)
    assert (record["uri"], record["aliases"], record["size_bytes"]) == ("models:/shown/1", ["candidate"], 2000)


def test_promote_from_the_command_line(model: Path) -> None:
    registry.register("cli", model, run_id="run1")
    assert run("promote", "cli", "1", "--alias", "champion").stdout == "models:/cli@champion is now version 1\n"
    assert registry.resolve("models:/cli@champion") == model
    failed = run("promote", "cli", "2", "--alias", "champion")
    assert isinstance(failed.exception, TrackingError)
    assert failed.exception.exit_code == 2


def test_the_runs_table_and_its_json() -> None:
    opened = Run.open("job-1", "[shown] run", tags={"tandem.phase": "pretrain"})
    opened.log_metrics({"train/loss": 2.25, "eval/accuracy": 0.75}, step=3)
    opened.end("FAILED")
    line = run("runs", "shown").stdout.splitlines()[1]
    assert line.startswith("[shown] run  pretrain  FAILED")
    assert line.rstrip().endswith("2.25  accuracy 0.75")
    (record,) = json.loads(run("runs", "shown", "--json").stdout)
    assert (record["run_id"], record["key"], record["loss"]) == (opened.run_id, "job-1", 2.25)
    assert run("runs", "no-such-run").stdout == ""


@pytest.mark.parametrize("arguments", [["runs"], ["models"], ["promote", "m", "1", "--alias", "a"]])
def test_without_a_server_every_command_names_the_address(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    failed = run(*arguments)
    assert isinstance(failed.exception, TrackingError)
    assert address in str(failed.exception)
    assert failed.stdout == ""
