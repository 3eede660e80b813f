"""An object store on this machine that speaks as much of S3 as reading takes: lists, heads, and ranges of objects."""

from __future__ import annotations

import hashlib
import re
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from xml.sax.saxutils import escape


@dataclass
class Store:
    """One bucket, and what was fetched from it."""

    port: int = 0
    objects: dict[str, bytes] = field(default_factory=dict)
    fetched: list[int] = field(default_factory=list)
    """Bytes of each object, or range of one, that was sent."""
    fails: bool = False
    """True: what is asked for is not sent."""

    def uri(self, name: str) -> str:
        """Return the URI of an object, a folder or a glob."""
        return f"s3://reader:secret@bucket/{name}?endpoint_override=127.0.0.1:{self.port}&scheme=http&region=us-east-1"


@contextmanager
def served() -> Iterator[Store]:
    """Serve a bucket."""
    store = Store()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(store))
    store.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _listing(store: Store, prefix: str) -> bytes:
    found = "".join(
        f"<Contents><Key>{escape(name)}</Key><Size>{len(content)}</Size><ETag>&quot;{_etag(content)}&quot;</ETag>"
        "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
        for name, content in sorted(store.objects.items())
        if name.startswith(prefix)
    )
    count = found.count("<Key>")
    about = f"<Name>bucket</Name><KeyCount>{count}</KeyCount><MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated>"
    return (
        '<?xml version="1.0" encoding="UTF-8"?>'
        f'<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{about}{found}</ListBucketResult>'
    ).encode()


def _etag(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _handler(store: Store) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # an answer in one piece: in two, the second waits for the first one's receipt

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path, _, query = self.path.partition("?")
            name = urllib.parse.unquote(path).removeprefix("/bucket").lstrip("/")
            asked = urllib.parse.parse_qs(query)
            if not name:
                self._answer(200, _listing(store, asked.get("prefix", [""])[0]))
            elif name not in store.objects:
                self._answer(404, b"")
            elif store.fails and self.command == "GET":
                self._answer(403, b"<Error><Code>AccessDenied</Code><Message>not any more</Message></Error>")
            else:
                content = store.objects[name]
                span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                part = content[int(span[1]) : int(span[2]) + 1] if span else content
                if self.command == "GET":
                    store.fetched.append(len(part))
                self._answer(206 if span else 200, part, _etag(content))

        def _answer(self, status: int, body: bytes, etag: str = "") -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
            if etag:
                self.send_header("ETag", f'"{etag}"')
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    return Handler
