"""MLflow as its Deployment starts it: the manifest's own arguments, a real PostgreSQL, and the Service's name."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from cluster import specfile
from cluster.kubernetes import beside
from cluster.kubernetes.spec import DeploymentSpec
from tests.support import postgres
from tests.support.mlflow_server import REPOSITORY, free_port

DEPLOYMENT = "name: lab\nnamespace: ml\nimage: registry.example/tandem:0.1.0\n"


def status(port: int, path: str, host: str) -> int:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers={"Host": host})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


@pytest.mark.skipif(postgres.missing() is not None, reason=postgres.missing() or "")
def test_it_keeps_its_runs_in_postgresql_and_answers_to_the_services_name(tmp_path: Path) -> None:
    spec = specfile.loads(DEPLOYMENT, DeploymentSpec)
    [server] = [each for each in beside.tracking(spec) if each["kind"] == "Deployment"]
    [container] = server["spec"]["template"]["spec"]["containers"]
    given = dict(zip(container["args"][::2], container["args"][1::2], strict=True))
    assert [each["name"] for each in container["env"]] == ["PGPASSWORD"]
    port, word = free_port(), "in-no-argument"
    with postgres.server(password=word) as url:
        dialect = given["--backend-store-uri"].partition("://")[0]
        own = {"--root": str(tmp_path), "--host": "127.0.0.1", "--port": str(port)}
        own["--artifacts-destination"] = str(tmp_path / "artifacts")
        own["--backend-store-uri"] = f"{dialect}://{url.partition('://')[2]}"  # a socket in place of the Service
        words = [word for pair in {**given, **own}.items() for word in pair]
        environment = {**os.environ, "PGPASSWORD": word, "PYTHONPATH": str(REPOSITORY)}
        with (tmp_path / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, *container["command"][1:], *words], env=environment, stdout=log, stderr=log
            )
        try:
            deadline = time.monotonic() + 120
            while status(port, "/health", "10.1.2.3:5000") != 200:  # as a kubelet asks, by the pod's address
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.2)
            path = "/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default"
            name = beside.tracking_uri(spec).removeprefix("http://")
            assert (status(port, path, name), status(port, path, "elsewhere.example")) == (200, 403)
            assert word not in " ".join(words)
        finally:
            process.terminate()
            process.wait(30)
