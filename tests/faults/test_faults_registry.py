"""The server is killed at every point of a registration: one version in the end, and the alias last."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.mlflow_server import LossyProxy, MlflowServer
from tracking import manifest, outbox, registry
from tracking.errors import ServerUnreachable
from tracking.run import Run


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    running = MlflowServer(tmp_path_factory.mktemp("mlflow")).start()
    yield running
    running.kill()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "model.safetensors").write_bytes(b"0" * 2000)
    manifest.write(directory, manifest.ModelManifest(name="lm", task="causal-lm", architecture="llama"))
    return directory


@pytest.mark.parametrize(
    ("point", "kill"),
    [
        ("/registered-models/create", "before"),
        ("/registered-models/create", "after"),
        ("/model-versions/create", "before"),
        ("/model-versions/create", "after"),
        ("/registered-models/alias", "before"),
        ("/registered-models/alias", "after"),
    ],
)
def test_killed_while_a_version_is_registered(server: MlflowServer, model: Path, point: str, kill: str) -> None:
    name = f"{point.rpartition('/')[2]}-{kill}-{point.split('/')[1]}"
    with LossyProxy(server, lose=point, kill=kill) as proxy:
        with pytest.raises(ServerUnreachable):
            registry.register(name, model, run_id="run1", alias="champion", tracking_uri=proxy.url)
        assert len(proxy.lost) == 1, "the server was killed there"
        server.start()
        before = registry.versions(name, server.url) if name in registry.models(server.url) else []
        assert all(version.aliases in ((), ("champion",)) for version in before)
        registry.register(name, model, run_id="run1", alias="champion", tracking_uri=proxy.url)
    (version,) = registry.versions(name, server.url)
    assert version.aliases == ("champion",)
    assert registry.resolve(f"models:/{name}@champion", server.url) == model


def test_a_version_that_a_job_could_not_register_is_registered_when_its_run_is_settled(
    server: MlflowServer, model: Path, tmp_path: Path
) -> None:
    run = Run.open("late-1", "late", tracking_uri=server.url)
    spool = tmp_path / "late-1" / "spool"
    outbox.postpone(spool, outbox.Version("late", str(model), "champion"))
    outbox.note(spool, outbox.Ending("late-1", "late", "FINISHED"))
    server.kill()
    with pytest.raises(ServerUnreachable):
        outbox.settle(spool, server.url)
    server.start()
    outbox.settle(spool, server.url)
    assert outbox.pending(tmp_path) == []
    found = registry.find_version("models:/late@champion", server.url)
    assert (found.run_id, found.directory) == (run.run_id, model)
    assert run.status == "FINISHED"
