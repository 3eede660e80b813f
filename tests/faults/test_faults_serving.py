"""A replica that no longer answers is replaced and ended, the others answer meanwhile, and a later `serve up` works."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.connect import Connection
from serve import endpoints
from serve.spec import ServeSpec
from tests.support import tiny_models

REPLACED_S = 20.0


def spec(model: Path, replicas: int) -> ServeSpec:
    tiny = {"model": str(model), "replicas": replicas, "resources": {"cpus_per_replica": 1}}
    return ServeSpec.model_validate({"models": {"tiny": tiny}, "drain_s": 300, "start_timeout_s": 120})


def details() -> dict[str, Any]:
    applications = endpoints._details()["applications"]
    found: dict[str, Any] = applications["tandem.tiny"]["deployments"]["engine"]
    return found


def running() -> dict[str, int]:
    """Return the pids of the replicas that run, by the replica's id."""
    return {r["replica_id"]: r["pid"] for r in details()["replicas"] if r["state"] == "RUNNING"}


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


class Asking:
    """Asks one question after the other, in a thread of its own."""

    def __init__(self, endpoint: str) -> None:
        self.answers: list[int] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(endpoint,), daemon=True)
        self._thread.start()

    def _run(self, endpoint: str) -> None:
        while not self._ended.wait(0.05):
            self.answers.append(ask(endpoint))

    def end(self) -> list[int]:
        self._ended.set()
        self._thread.join(60)
        return self.answers


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.language_model(tmp_path_factory.mktemp("tiny"), context=256)


@pytest.fixture
def down() -> Iterator[None]:
    yield
    endpoints.down(print)


def test_a_stopped_replica_is_replaced_and_ended(cluster: Connection, model: Path, down: None) -> None:
    endpoint = endpoints.up(spec(model, 2), print)["endpoint"]
    asking = Asking(endpoint)
    before = running()
    name, pid = next(iter(before.items()))
    os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED, 5)  # the fault is there
    took = wait_for(lambda: len(running()) == 2 and name not in running(), REPLACED_S)
    print(f"replaced after {took:.1f} s")
    wait_for(lambda: not psutil.pid_exists(pid), 10)
    answers = asking.end()
    lost = [status for status in answers if status != 200]
    print(f"{len(answers)} requests, lost: {lost}")
    assert len(answers) > 20
    assert len(lost) <= 1, "only what the stopped replica had accepted is lost"
    assert set(lost) <= {503}
    endpoints.up(spec(model, 1), print)
    wait_for(lambda: len(running()) == 1, 20)
    assert ask(endpoint) == 200
