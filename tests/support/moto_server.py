"""A real S3 server on this machine: moto's, in a process of its own.

    with running(monkeypatch) as server:  Store(server.uri("bucket/models"))

The environment has credentials for it meanwhile. It speaks the protocol as boto's own tests want it: uploads in parts,
ranges, lists in pages, errors. Failures come from a proxy before it (tests/support/faulty_proxy.py).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "tandem",
    "AWS_SECRET_ACCESS_KEY": "a secret",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_REGION": "us-east-1",
}
SERVER = """
import io, threading
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

WSGIRequestHandler.protocol_version = "HTTP/1.1"
WSGIRequestHandler.log_request = lambda *_: None
moto, one = DomainDispatcherApplication(create_backend_app), threading.Lock()

def whole(environ, start_response):
    stream, length = environ["wsgi.input"], environ.get("CONTENT_LENGTH")
    body = stream.read(int(length)) if length else stream.read() if environ.get("wsgi.input_terminated") else b""
    environ = {**environ, "wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body))}
    with one:  # two requests at once for one key have moto close what the other reads
        return list(moto(environ, start_response))

server = make_server("127.0.0.1", 0, whole, threaded=True)
print("port", server.server_port, flush=True)
server.serve_forever()
"""


@dataclass(frozen=True)
class MotoServer:
    """A server that runs. Its buckets are in its memory."""

    port: int

    def uri(self, place: str, port: int | None = None) -> str:
        """Return the URI of a bucket, or of a place in it; of a proxy before it by its port."""
        return f"s3://{place}?endpoint_override=127.0.0.1:{port or self.port}&scheme=http&region=us-east-1"

    def client(self) -> object:
        """Return a file system of it, to look at and to make buckets."""
        from pyarrow import fs

        return fs.S3FileSystem(
            endpoint_override=f"127.0.0.1:{self.port}", scheme="http", region="us-east-1", allow_bucket_creation=True
        )


@contextmanager
def running(monkeypatch: pytest.MonkeyPatch, bucket: str = "bucket") -> Iterator[MotoServer]:
    """Run a server with one bucket, and credentials in the environment."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    for name in [name for name in os.environ if name.lower() in ("http_proxy", "https_proxy", "all_proxy")]:
        monkeypatch.delenv(name)
    process = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = re.fullmatch(r"port (\d+)\n", process.stdout.readline())
        assert found, "moto's server has started"
        server = MotoServer(int(found[1]))
        server.client().create_dir(bucket)  # type: ignore[attr-defined]
        yield server
    finally:
        process.kill()
        process.communicate()
