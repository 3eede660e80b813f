"""A real MLflow server for tests, and a proxy that loses replies or kills the server.

A test module gets the fixture `mlflow_server`, one for the whole session, by naming this module in `pytest_plugins`.
PYTEST_DONT_REWRITE: the modules that use it import it before pytest sees it as a plugin.
"""

import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def free_port() -> int:
    """Return a TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class MlflowServer:
    """`python -m tracking.server` in a directory; may be killed and started again on the same port and database."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def is_running(self) -> bool:
        """Whether it was started and not killed."""
        return self._process is not None

    def start(self) -> "MlflowServer":
        command = [sys.executable, "-m", "tracking.server", "--root", str(self.root), "--port", str(self.port)]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / "server.log").open("ab") as log:
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=self.root)
        self._wait_until_healthy()
        return self

    def kill(self) -> None:
        """End it as a power cut would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _wait_until_healthy(self) -> None:
        assert self._process is not None
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=1):
                    return
            except OSError:
                assert self._process.poll() is None, (self.root / "server.log").read_text()
                time.sleep(0.1)
        raise AssertionError("the MLflow server did not start")


class LossyProxy:
    """Hand every request to the server, and drop the reply to the first request whose path ends as asked.

    `kill` has the server killed at this request: `before` it gets it, or `after` it answered.
    """

    def __init__(self, server: MlflowServer, lose: str, kill: str = "") -> None:
        self.lost: list[str] = []
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                fatal = self.path.endswith(lose) and not proxy.lost
                if fatal and kill == "before":
                    server.kill()
                    proxy.lost.append(self.path)
                if not server.is_running:
                    self.close_connection = True
                    return
                upstream = HTTPConnection("127.0.0.1", server.port)
                upstream.request(self.command, self.path, body, dict(self.headers))
                reply = upstream.getresponse()
                content = reply.read()
                upstream.close()
                if fatal:
                    if kill == "after":
                        server.kill()
                    proxy.lost.append(self.path)
                    self.close_connection = True
                    return
                self.send_response(reply.status)
                self.send_header("Content-Type", reply.headers["Content-Type"])
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_PATCH = do_DELETE = do_POST

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "LossyProxy":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """Start one server for all tests that only need some server."""
    server = MlflowServer(tmp_path_factory.mktemp("mlflow")).start()
    yield server
    server.kill()
