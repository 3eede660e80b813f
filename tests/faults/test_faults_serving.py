"""A replica that no longer answers is replaced and ended, the others answer meanwhile, and a later `serve up` works."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from cluster import local, processes
from cluster.connect import Connection
from cluster.errors import UserError
from serve import cli, endpoints
from serve.spec import HttpSpec, ServeSpec
from tests.conftest import free_port
from tests.support import blocking_engine, tiny_models
from tests.support.controller import controller_pid
from tests.support.own_cluster import own_cluster

ENDED_S = 20.0
"""Three checks without an answer, 2.5 s each, and what lies between them."""


def spec(model: Path, replicas: int) -> ServeSpec:
    tiny = {"model": str(model), "replicas": replicas, "resources": {"cpus_per_replica": 1}}
    return ServeSpec.model_validate({"models": {"tiny": tiny}, "drain_s": 300, "start_timeout_s": 120})


def details(model: str = "tiny") -> dict[str, Any]:
    applications = endpoints._details()["applications"]
    found: dict[str, Any] = applications[f"tandem.{model}"]["deployments"]["engine"]
    return found


def running(model: str = "tiny") -> dict[str, int]:
    """Return the pids of the replicas that run, by the replica's id."""
    return {r["replica_id"]: r["pid"] for r in details(model)["replicas"] if r["state"] == "RUNNING"}


def wait_for(what: Callable[[], Any], limit_s: float) -> float:
    """Wait until `what` is true; return how long that took."""
    began = time.monotonic()
    while not what():
        assert time.monotonic() - began < limit_s, f"not within {limit_s} s: {details()}"
        time.sleep(0.2)
    return time.monotonic() - began


def ask(endpoint: str) -> int:
    body = json.dumps({"model": "tiny", "prompt": "a b c", "max_tokens": 4, "temperature": 0}).encode()
    request = urllib.request.Request(f"{endpoint}/v1/completions", body, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def infer(endpoint: str, first: int = 1) -> int:
    image = {"name": "image", "shape": [1, 8, 8, 1], "datatype": "UINT8", "data": [first] + [98] * 63}
    body = json.dumps({"inputs": [image]}).encode()
    request = urllib.request.Request(f"{endpoint}/v2/models/own/infer", body, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


class Asking:
    """Asks one question after the other, in a thread of its own."""

    def __init__(self, question: Callable[[], int]) -> None:
        self.answers: list[int] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(question,), daemon=True)
        self._thread.start()

    def _run(self, question: Callable[[], int]) -> None:
        while not self._ended.wait(0.05):
            self.answers.append(question())

    def end(self) -> list[int]:
        self._ended.set()
        self._thread.join(60)
        return self.answers


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.language_model(tmp_path_factory.mktemp("tiny"), context=2048)


@pytest.fixture
def down() -> Iterator[None]:
    yield
    endpoints.down(print)


@pytest.mark.alone  # three checks of 2.5 s find what does not answer, and must find nothing else
def test_replicas_that_no_longer_answer_are_replaced_and_ended(
    cluster: Connection, model: Path, tmp_path: Path, down: None
) -> None:
    """One is stopped by a signal, one of another model blocks its event loop; no request is lost by either."""
    blocked = blocking_engine.write(tmp_path)
    own = {"model": str(tiny_models.image_classifier(tmp_path / "images")), "engine": "blocking_engine:ENGINE"}
    both = spec(model, 2).model_dump(exclude_unset=True)
    both["models"]["own"] = {**own, "replicas": 2, "resources": {"cpus_per_replica": 0.5}}
    both["models"]["tiny"]["resources"] = {"cpus_per_replica": 0.5}
    both["gateway"] = {"replicas": 2}
    endpoint = endpoints.up(ServeSpec.model_validate(both), print, tmp_path / "serve.yaml")["endpoint"]
    askings = [Asking(lambda: ask(endpoint)), Asking(lambda: infer(endpoint)), Asking(lambda: infer(endpoint))]
    before = {name: running(name) for name in ("tiny", "own")}
    name, pid = next(iter(before["tiny"].items()))
    culprit = Asking(lambda: infer(endpoint, blocking_engine.BLOCKS))
    wait_for(blocked.exists, 10)  # the second fault is there
    os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED, 5)  # the first fault is there

    def ended() -> bool:
        own_gone = [old for old in before["own"] if old not in running("own")]
        return bool(own_gone) and name not in running() and not psutil.pid_exists(pid)

    print(f"both ended after {wait_for(ended, ENDED_S):.1f} s")
    print(f"replaced after {wait_for(lambda: len(running()) == len(running('own')) == 2, 60):.1f} s more")
    answers = [*culprit.end(), *(answer for asking in askings for answer in asking.end())]
    lost = [status for status in answers if status != 200]
    print(f"{len(answers)} requests, lost: {lost}")
    assert len(answers) > 40
    assert lost == []
    (gone,) = [pid for old, pid in before["own"].items() if old not in running("own")]
    assert not psutil.pid_exists(gone)
    gateway_that_is_killed_leaves_the_port_to_the_other(endpoint)
    endpoints.up(spec(model, 1), print)
    wait_for(lambda: len(running()) == 1, 20)
    assert ask(endpoint) == 200
    controller_that_hangs_is_said_and_replaced(model)
    assert ask(endpoint) == 200


def gateway_that_is_killed_leaves_the_port_to_the_other(endpoint: str) -> None:
    """Its clients lose their connections, further ones are answered at once, and another gateway takes its place."""
    before = gateways()
    assert len(before) == 2
    name, pid = next(iter(before.items()))
    streaming = [urllib.request.urlopen(stream(endpoint), timeout=60) for _ in range(16)]
    for each in streaming:
        assert each.readline().startswith(b"data: ")
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not psutil.pid_exists(pid), 5)  # the fault is there
    assert [ask(endpoint) for _ in range(20)] == [200] * 20
    whole = sum(ended_whole(each) for each in streaming)
    print(f"{whole} of 16 streams went on")
    assert 0 < whole < 16, "the kernel had given each gateway some"
    print(f"another gateway after {wait_for(lambda: name not in gateways() and len(gateways()) == 2, 30):.1f} s")
    assert [ask(endpoint) for _ in range(20)] == [200] * 20


def gateways() -> dict[str, int]:
    """Return the pids of the gateways that run, by the replica's id."""
    replicas = endpoints._details()["applications"]["tandem"]["deployments"]["gateway"]["replicas"]
    return {replica["replica_id"]: replica["pid"] for replica in replicas if replica["state"] == "RUNNING"}


def stream(endpoint: str) -> urllib.request.Request:
    body = {"model": "tiny", "prompt": "a", "max_tokens": 1500, "ignore_eos": True, "stream": True}
    return urllib.request.Request(
        f"{endpoint}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )


def ended_whole(answer: Any) -> bool:
    """Read a stream to its end; a cut one raises, or lacks the last event."""
    try:
        return bool(answer.read().endswith(b"data: [DONE]\n\n"))
    except (OSError, http.client.HTTPException):
        return False


def controller_that_hangs_is_said_and_replaced(model: Path) -> None:
    """Stop Serve's controller by a signal: requests go on, `status` says so, `up` has another one take over."""
    before, pid = running(), controller_pid()
    endpoint = endpoints.endpoint()
    os.kill(pid, signal.SIGSTOP)
    wait_for_stop(pid)  # the fault is there
    assert [ask(endpoint) for _ in range(3)] == [200] * 3
    began = time.monotonic()
    with pytest.raises(endpoints.ControllerSilent, match="controller does not answer"):
        endpoints.status()
    assert time.monotonic() - began < 20
    said: list[str] = []
    endpoints.up(spec(model, 1), said.append)
    assert any("controller has not answered" in line for line in said), said
    assert not psutil.pid_exists(pid)
    assert running() == before, "models went on"


def wait_for_stop(pid: int) -> None:
    """Wait until the process is stopped, without asking Serve."""
    while psutil.Process(pid).status() != psutil.STATUS_STOPPED:
        time.sleep(0.05)


@pytest.fixture
def mortal() -> Iterator[local.LocalCluster]:
    """A head in a home of its own, which may be killed."""
    with own_cluster(job_grace_s=1, cpus=3) as started:
        yield started


def test_the_head_is_killed_and_started_again(mortal: local.LocalCluster, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(json.dumps(spec(model, 1).model_dump(mode="json", exclude_unset=True)))
    taken = free_port()  # not the one that would be chosen anew
    before = endpoints.up(spec(model, 1).model_copy(update={"http": HttpSpec(port=taken)}), print, path)["endpoint"]
    assert ask(before) == 200
    (replica,) = running().values()
    for pid in mortal.daemons:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: local.state() is None, 20)  # the fault is there
    again = local.up(cpus=3)
    assert (again.ray_address, again.dashboard_url, again.mlflow_url) == (
        mortal.ray_address,
        mortal.dashboard_url,
        mortal.mlflow_url,
    )
    assert not psutil.pid_exists(replica), "nothing of the old cluster is left"
    left = processes.members(mortal.id, mortal.sessions, mortal.started_at)
    assert not left
    said = CliRunner().invoke(cli.app, ["status"]).output.replace("\n", " ")
    assert f"tiny at {before} ended with the cluster: `tandem serve up {path}` serves it again" in said
    with pytest.raises(UserError, match="ended with the cluster"):
        endpoints.endpoint()
    assert endpoints.up(spec(model, 1), print, path)["endpoint"] == before, "clients know the port"
    assert ask(before) == 200
    endpoints.down(print)


def test_a_port_that_is_taken_is_a_sentence_at_once(cluster: Connection, model: Path, down: None) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(UserError, match=f"http.port {port} on 127.0.0.1 is taken"):
            endpoints.up(spec(model, 1).model_copy(update={"http": HttpSpec(port=port)}), print)
