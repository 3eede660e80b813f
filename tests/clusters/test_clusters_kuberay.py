"""The Serve config of a RayService, deployed by Ray's own `serve deploy`, and what pods' probes and hooks see of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from cluster.connect import Connection, connection
from cluster.kubernetes import health
from serve import endpoints, work
from serve.deploy import kuberay, ray_serve_internals
from tests.conftest import free_port
from tests.support import tiny_models
from tests.support.own_cluster import own_cluster

ROOT = Path(__file__).parents[2]


def until(found: Callable[[], Any], seconds: float = 180.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.3)
    return value


def environment(cluster: Connection) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": cluster.ray_address}


def deploy(cluster: Connection, config: dict[str, Any], folder: Path) -> None:
    """Send a config as KubeRay's operator does: by the REST API of the dashboard, through Ray's own command."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "ray.serve.scripts", "deploy", str(path), "--address", cluster.jobs_address]
    sent = subprocess.run(command, env=environment(cluster), capture_output=True, text=True, timeout=120)
    assert sent.returncode == 0, sent.stdout + sent.stderr


def statuses(cluster: Connection) -> dict[str, str]:
    """Return the applications' states, with the reason where one failed."""
    details = ray_serve_internals.serve_details(cluster.jobs_address)
    return {
        name: app["status"] if app["status"] != "DEPLOY_FAILED" else f"DEPLOY_FAILED: {app['message']}"
        for name, app in details["applications"].items()
    }


@pytest.fixture(scope="module")
def cluster() -> Iterator[Connection]:
    """A cluster whose Serve nobody else has asked for anything."""
    with own_cluster(job_grace_s=1, cpus=2):
        yield connection()


@pytest.fixture(scope="module")
def served(cluster: Connection, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int]]:
    folder, port = tmp_path_factory.mktemp("service"), free_port()
    model = tiny_models.image_classifier(folder / "shapes")
    spec = {"models": {"shapes": {"model": str(model)}}, "http": {"port": port}, "keys": {"required": "never"}}
    (folder / "serve.yaml").write_text(yaml.safe_dump({**spec, "drain_s": 10}))
    with_code = dict(work.read(folder / "serve.yaml", []).config)
    # A pod's image has Tandem installed; here its code travels with the application.
    shipped = {"env_vars": {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": cluster.tracking_uri}}
    with_code["applications"] = [{**with_code["applications"][0], "runtime_env": shipped}]
    deploy(cluster, with_code, folder)
    yield folder, port
    deploy(cluster, {"proxy_location": "Disabled", "applications": []}, folder)  # what came by a config goes by one
    until(lambda: work.APPLICATION not in statuses(cluster))
    endpoints.down(print)


def test_the_config_brings_an_endpoint_up_and_is_healthy_when_its_models_are(
    cluster: Connection, served: tuple[Path, int]
) -> None:
    _, port = served
    found = until(lambda: (now := statuses(cluster)) and now.get(work.APPLICATION, "DEPLOYING") != "DEPLOYING" and now)
    assert found == {work.APPLICATION: "RUNNING", "tandem": "RUNNING", "tandem.shapes": "RUNNING"}
    assert httpx.get(f"http://127.0.0.1:{port}/v2/models/shapes/ready").json()["ready"] is True
    answer = httpx.get(f"http://127.0.0.1:{port}/-/healthz")
    assert (answer.status_code, answer.text) == (200, "success")
    details = ray_serve_internals.serve_details(cluster.jobs_address)
    assert details["proxy_location"] == "Disabled"


def test_the_probe_knows_raylet_gcs_and_gateway(
    cluster: Connection, served: tuple[Path, int], capsys: pytest.CaptureFixture[str]
) -> None:
    _, port = served
    until(lambda: health.answer(port, health.SERVE_PATH))
    dashboard = int(cluster.jobs_address.rpartition(":")[2])
    agent = _agent_port(cluster)
    ports = ["--agent-port", str(agent), "--dashboard-port", str(dashboard)]
    assert health.main(["--head", "--serve", str(port), "--serve-if-listening", str(port), *ports]) == 0
    nobody = free_port()
    assert health.main(["--serve-if-listening", str(nobody), *ports]) == 0
    assert health.main(["--serve", str(nobody), *ports]) == 1
    assert capsys.readouterr().out == "gateway does not listen\n"
    assert health.main(["--head", "--agent-port", str(agent), "--dashboard-port", str(nobody)]) == 1


def _agent_port(cluster: Connection) -> int:
    """Return where the agent of the head listens: 52365, unless a cluster besides this one has it already."""
    [raylet] = [
        process
        for process in psutil.process_iter(["cmdline"])
        if f"--gcs-address={cluster.ray_address}" in (process.info["cmdline"] or [])
        and Path(process.info["cmdline"][0]).name == "raylet"
    ]
    listening = [
        each.laddr.port
        for child in raylet.children()
        for each in child.net_connections("tcp")
        if each.status == psutil.CONN_LISTEN
    ]
    answering = [port for port in listening if "success" in (health.answer(port, health.RAYLET_PATH) or "")]
    if not answering:
        pytest.skip("the agent's port is taken by another cluster on this machine: no probe can be answered")
    return answering[0]


def test_a_changed_spec_changes_the_endpoint_and_a_wrong_one_says_why(
    cluster: Connection, served: tuple[Path, int]
) -> None:
    folder, port = served
    config = dict(work.read(folder / "serve.yaml", ["models.twice.model=" + str(folder / "shapes")]).config)
    shipped = {"env_vars": {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": cluster.tracking_uri}}
    config["applications"] = [{**config["applications"][0], "runtime_env": shipped}]
    deploy(cluster, config, folder)
    until(lambda: statuses(cluster).get("tandem.twice") == "RUNNING")
    until(lambda: httpx.get(f"http://127.0.0.1:{port}/v2/models/twice/ready").status_code == 200)
    config["applications"][0]["args"]["spec"]["models"]["twice"]["model"] = "models:/nobody@champion"
    deploy(cluster, config, folder)

    def failed() -> str | None:
        application = ray_serve_internals.serve_details(cluster.jobs_address)["applications"][work.APPLICATION]
        deployment = application["deployments"].get(kuberay.DEPLOYMENT, {})
        said = application["message"] + deployment.get("message", "")
        return said if "nobody" in said else None

    assert "nobody" in until(failed)
    assert httpx.get(f"http://127.0.0.1:{port}/v2/models/shapes/ready").status_code == 200


def test_what_up_says_is_read() -> None:
    progress, wrong = endpoints.MARK + json.dumps({"progress": "x"}), endpoints.MARK + json.dumps({"error": "why"})
    assert kuberay.outcome([progress, endpoints.MARK + json.dumps({"outcome": {"a": 1}})]) == {"a": 1}
    with pytest.raises(kuberay.UpFailed, match="why"):
        kuberay.outcome([progress, wrong])
    with pytest.raises(kuberay.UpFailed, match="code of your own: install it"):
        kuberay.outcome([endpoints.MARK + json.dumps({"outcome": {"code_wanted": "models.x: its task"}})])
    with pytest.raises(kuberay.UpFailed, match="without a word"):
        kuberay.outcome(["Killed"])
