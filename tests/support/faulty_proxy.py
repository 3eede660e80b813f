"""A proxy before an HTTP store that fails on purpose: slow, busy, cut off, silent, gone.

    with before(server.port) as proxy:
        proxy.busy = 3                       the next three requests are answered 503 SlowDown
        proxy.cut_answers = 1                one answer ends in the middle of its body
        with proxy.gone(): …                 nobody listens at its port

It reads each request whole before it decides, so that what it does is of requests, not of packets; but for `cut_sent`,
which cuts a request off while its body comes.
"""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PIECE_BYTES = 64 << 10
SLOW_DOWN = "<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
WRONG_KEY = (
    "<Error><Code>InvalidAccessKeyId</Code>"
    "<Message>The AWS Access Key Id you provided does not exist in our records.</Message></Error>"
)


@dataclass
class Request:
    """A request, as it came."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Proxy:
    """Its failures may be changed while it runs."""

    target: int
    port: int = 0
    latency_s: float = 0.0
    """Before each answer."""
    bytes_per_s: float = 0.0
    """Of answers; 0: as fast as it goes."""
    busy: int = 0
    """So many of the next requests are answered 503."""
    busy_share: float = 0.0
    """Of all requests, so many are."""
    cut_answers: int = 0
    """So many of the next answers with a body of more than a piece end after half of it."""
    cut_sent: int = 0
    """So many of the next requests with such a body are cut off after half of it."""
    lost_answers: int = 0
    """So many of the next answers to a PUT or a POST never come, though it was done."""
    silent: threading.Event = field(default_factory=threading.Event)
    """Requests are taken, and never answered."""
    key: str = ""
    """The only access key that is known; empty: any is."""
    wanted: Callable[[Request], bool] = lambda request: True
    """Which requests may fail at all."""
    log: list[str] = field(default_factory=list)
    """Of each request its method, path and what became of it."""

    def __post_init__(self) -> None:
        self._random, self._lock = random.Random(0), threading.Lock()
        self._open: set[socket.socket] = set()
        self._listen()

    def _listen(self) -> None:
        handler = type("Bound", (_Handler,), {"proxy": self})
        self._server = _Server(("127.0.0.1", self.port), handler)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop to listen, and cut every connection."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        with self._lock:
            for each in self._open:
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    @contextmanager
    def gone(self) -> Iterator[None]:
        """Be gone meanwhile: connections are refused."""
        self.close()
        try:
            yield
        finally:
            self._listen()

    def gone_for(self, seconds: float) -> threading.Thread:
        """Be gone from now on for so long, while the caller goes on; the thread ends when it is back."""
        self.close()

        def back() -> None:
            time.sleep(seconds)
            self._listen()

        thread = threading.Thread(target=back, daemon=True)
        thread.start()
        return thread

    def takes(self, name: str) -> bool:
        """Say whether one of the failures of that name is left, and take it."""
        with self._lock:
            left = getattr(self, name)
            if left > 0:
                setattr(self, name, left - 1)
            return bool(left > 0)

    def is_busy(self) -> bool:
        """Say whether this request is answered 503."""
        return self.takes("busy") or (self.busy_share > 0 and self._random.random() < self.busy_share)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def handle_error(self, *_: Any) -> None:
        """Say nothing of connections that were cut: most were here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    proxy: Proxy

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def setup(self) -> None:
        super().setup()
        with self.proxy._lock:
            self.proxy._open.add(self.connection)

    def finish(self) -> None:
        with self.proxy._lock:
            self.proxy._open.discard(self.connection)
        with suppress(OSError, ValueError):
            super().finish()

    def _relay(self) -> None:
        proxy = self.proxy
        request = Request(self.command, self.path, dict(self.headers.items()), b"")
        fails = proxy.wanted(request)
        length = int(self.headers.get("Content-Length") or 0)
        size = length or int(self.headers.get("X-Amz-Decoded-Content-Length") or 0)
        if fails and size > PIECE_BYTES and proxy.takes("cut_sent"):
            self.rfile.read(size // 2)
            self._cut("sent")
            return
        request.body = self._body(length)
        if proxy.key and f"Credential={proxy.key}/" not in request.headers.get("Authorization", ""):
            self._answer(403, WRONG_KEY)
            return
        while proxy.silent.is_set() and fails:
            time.sleep(0.05)
        time.sleep(proxy.latency_s)
        if fails and proxy.is_busy():
            self._answer(503, SLOW_DOWN)
            return
        self._pass_on(request, fails)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _relay

    def _body(self, length: int) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(length)
        found = b""
        while count := int(self.rfile.readline().split(b";")[0], 16):
            found += self.rfile.read(count)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return found

    def _pass_on(self, request: Request, fails: bool) -> None:
        proxy = self.proxy
        hop = ("transfer-encoding", "content-length", "connection", "expect")
        headers = {name: value for name, value in request.headers.items() if name.lower() not in hop}
        connection = HTTPConnection("127.0.0.1", proxy.target, timeout=60)
        try:
            connection.request(request.method, request.path, request.body, headers)
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        if fails and request.method in ("PUT", "POST") and proxy.takes("lost_answers"):
            self._cut("lost")
            return
        proxy.log.append(f"{request.method} {request.path} {answer.status}")
        self.send_response_only(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        size = answer.getheader("Content-Length") if request.method == "HEAD" else None
        self.send_header("Content-Length", size or str(len(content)))
        self.end_headers()
        if request.method != "HEAD":
            self._send(content, cut=fails and len(content) > PIECE_BYTES and proxy.takes("cut_answers"))

    def _send(self, content: bytes, cut: bool) -> None:
        end = len(content) // 2 if cut else len(content)
        for start in range(0, end, PIECE_BYTES):
            piece = content[start : min(end, start + PIECE_BYTES)]
            self.wfile.write(piece)
            if self.proxy.bytes_per_s:
                time.sleep(len(piece) / self.proxy.bytes_per_s)
        if cut:
            self._cut("answer")

    def _answer(self, status: int, text: str) -> None:
        self.proxy.log.append(f"{self.command} {self.path} {status} by the proxy")
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text.encode())

    def _cut(self, what: str) -> None:
        self.proxy.log.append(f"{self.command} {self.path} cut off: {what}")
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def before(target: int) -> Iterator[Proxy]:
    """Run a proxy before a port of this machine."""
    proxy = Proxy(target)
    try:
        yield proxy
    finally:
        proxy.silent.clear()
        proxy.close()
