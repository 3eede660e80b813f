"""What runs in pods: probes ask real HTTP servers, and what leaves knows its addresses."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from cluster.kubernetes import health, leave
from tests.conftest import free_port


class Healthy(BaseHTTPRequestHandler):
    """Answers as Ray's agent, its dashboard and a gateway do; one path is not well."""

    def do_GET(self) -> None:
        sick = self.path == health.GCS_PATH
        self.send_response(503 if sick else 200)
        self.end_headers()
        self.wfile.write(b"GCS is away" if sick else b"success")

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def port() -> Iterator[int]:
    with HTTPServer(("127.0.0.1", 0), Healthy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def test_a_worker_is_well_where_its_raylet_and_its_gateway_are(port: int) -> None:
    assert health.main(["--agent-port", str(port), "--serve", str(port)]) == 0


def test_what_is_not_well_is_named(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert health.main(["--head", "--agent-port", str(port), "--dashboard-port", str(port)]) == 1
    assert health.main(["--agent-port", str(free_port())]) == 1
    assert health.main(["--agent-port", str(port), "--serve", str(free_port())]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "GCS: 503 GCS is away", "raylet does not listen", "gateway does not listen",
    ]  # fmt: skip


def test_a_gateway_that_is_not_there_does_not_end_its_pod_and_one_that_is_sick_does() -> None:
    assert health.wrong("gateway", None, must_listen=False) is None
    assert health.wrong("gateway", "no answer: timed out", must_listen=False) == "gateway: no answer: timed out"


def test_the_gcs_is_found_as_kuberay_tells_it() -> None:
    head = "lab-head-svc.ml.svc.cluster.local:6379"
    assert (leave.gcs_address({"RAY_ADDRESS": head}), leave.gcs_address({})) == (head, "127.0.0.1:6379")


def test_only_what_computes_counts_as_in_use() -> None:
    used = {"a": {"CPU": 0.0, "node:1": 0.001, "memory": 5.0}, "b": {"GPU": 1.0}}
    assert (leave.busy(used, ["a"]), leave.busy(used, ["a", "b"]), leave.busy(used, [])) == (False, True, False)
