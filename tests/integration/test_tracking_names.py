"""A real MLflow server, reached by names: its own, those that were added, and others."""

import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import daemons
from tests.support.mlflow_server import MlflowServer
from tracking import client
from tracking.errors import UnknownName
from tracking.server import HOSTS_VARIABLE

LIST = "/api/2.0/mlflow/experiments/search?max_results=1"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(HOSTS_VARIABLE, "mlflow.example.com, *.cluster.example")
        started = MlflowServer(tmp_path_factory.mktemp("hosts")).start()
    yield started
    started.kill()


def status(server: MlflowServer, host: str) -> int:
    request = urllib.request.Request(server.url + LIST, headers={"Host": host})
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_it_answers_to_its_own_and_to_added_names_and_to_no_other(server: MlflowServer) -> None:
    port = server.port
    known = [socket.gethostname(), socket.getfqdn(), "localhost", "10.1.2.3", "mlflow.example.com", "a.cluster.example"]
    answers = {host: status(server, f"{host}:{port}") for host in [*known, "evil.example"]}
    assert answers == {**dict.fromkeys(known, 200), "evil.example": 403}


def test_a_client_with_another_name_is_told_so_in_one_sentence(
    server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = socket.getaddrinfo
    local = lambda host, *rest, **more: real("127.0.0.1" if host == "evil.example" else host, *rest, **more)  # noqa: E731
    monkeypatch.setattr(socket, "getaddrinfo", local)  # a name that leads here, as DNS would have it
    monkeypatch.setenv("NO_PROXY", "*")
    found = client.connect(f"http://evil.example:{server.port}")
    assert daemons.is_unknown_name(f"http://evil.example:{server.port}")
    assert not daemons.is_unknown_name(server.url)
    with pytest.raises(
        UnknownName, match=r"does not answer to the name evil\.example .*TANDEM_MLFLOW_HOSTS=evil\.example"
    ):
        client.ask(found, lambda: found.search_experiments())


def test_it_does_not_start_to_answer_to_any_name(tmp_path: Path) -> None:
    import subprocess
    import sys

    command = [sys.executable, "-m", "tracking.server", "--root", str(tmp_path), "--allowed-hosts", "*"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert "DNS rebinding" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert list(tmp_path.iterdir()) == []
