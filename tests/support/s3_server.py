"""A small S3 server on this machine: objects in a dictionary, as much of the protocol as pyarrow's client speaks.

    with running(monkeypatch) as server:  Store(server.uri("bucket/models"))

Signatures are not checked. In the bucket `refused` every write is refused.
"""

from __future__ import annotations

import hashlib
import os
import threading
import xml.etree.ElementTree as tree
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "tandem",
    "AWS_SECRET_ACCESS_KEY": "a secret",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_REGION": "us-east-1",
}
CHANGED = "Thu, 01 Jan 2026 00:00:00 GMT"


class S3Server:
    """Buckets in memory. A key is `bucket/name`."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.uploads: dict[str, dict[int, bytes]] = {}
        """Parts of uploads that are not complete."""
        self.parts = 0
        """So many parts have come."""
        self.sent = 0
        """Bytes of objects, or ranges of them, that were asked for."""
        self.failing = 0
        """So many of the next parts of files are answered 503."""
        self.copies = True
        """False: it is asked to copy more than it can."""
        self.sends = True
        """False: no object is sent; lists and sizes are."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"store": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def uri(self, place: str) -> str:
        """Return the URI of a bucket, or of a folder, an object or a glob in it."""
        port = self._server.server_address[1]
        return f"s3://{place}?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"

    def close(self) -> None:
        """End it."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextmanager
def running(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """Run a server, with credentials in the environment."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    for name in [name for name in os.environ if name.lower() in ("http_proxy", "https_proxy", "all_proxy")]:
        monkeypatch.delenv(name)
    server = S3Server()
    try:
        yield server
    finally:
        server.close()


def etag(content: bytes) -> str:
    """Return what tells a content from another."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else an answer's second piece waits for the receipt of its first
    store: S3Server

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def _asked(self) -> tuple[str, dict[str, str]]:
        parts = urlsplit(self.path)
        return unquote(parts.path).lstrip("/"), {
            k: v[0] for k, v in parse_qs(parts.query, keep_blank_values=True).items()
        }

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(self._chunks())
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "aws-chunked" not in (self.headers.get("Content-Encoding") or ""):
            return body
        found = b""
        while body:
            size, _, body = body.partition(b"\r\n")
            count = int(size.split(b";")[0], 16)
            if not count:
                break
            found, body = found + body[:count], body[count + 2 :]
        return found

    def _chunks(self) -> Iterator[bytes]:
        """Yield a body of HTTP's own chunks."""
        while count := int(self.rfile.readline().split(b";")[0], 16):
            yield self.rfile.read(count)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        sent = {"Content-Length": str(len(body)), **{name.replace("_", "-"): value for name, value in headers.items()}}
        for name, value in sent.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _xml(self, text: str, status: int = 200) -> None:
        self._answer(status, f'<?xml version="1.0" encoding="UTF-8"?>{text}'.encode(), Content_Type="application/xml")

    def _refuse(self) -> None:
        self._xml("<Error><Code>AccessDenied</Code><Message>not now</Message></Error>", 403)

    def do_HEAD(self) -> None:
        """Say whether there is a bucket or an object."""
        key, _ = self._asked()
        if "/" not in key.rstrip("/"):
            self._answer(200)
        elif key in self.store.objects:
            content = self.store.objects[key]
            self._answer(200, Content_Length=str(len(content)), Last_Modified=CHANGED, ETag=f'"{etag(content)}"')
        else:
            self._answer(404)

    def do_GET(self) -> None:
        """Read an object, or a range of it, or list a bucket."""
        key, query = self._asked()
        if "list-type" in query:
            self._list(key.rstrip("/"), query)
            return
        if key not in self.store.objects:
            self._xml("<Error><Code>NoSuchKey</Code><Message>it is not there</Message></Error>", 404)
            return
        if not self.store.sends:
            self._refuse()
            return
        content = self.store.objects[key]
        asked, status, more = self.headers.get("Range"), 200, {"ETag": f'"{etag(content)}"'}
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last or len(content) - 1), len(content) - 1)
            status, more["Content_Range"] = 206, f"bytes {start}-{end}/{len(content)}"
            content = content[start : end + 1]
        self.store.sent += len(content)
        self._answer(status, content, Last_Modified=CHANGED, **more)

    def _list(self, bucket: str, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        names = sorted(key.partition("/")[2] for key in self.store.objects if key.startswith(f"{bucket}/"))
        found, folders = [], set()
        for name in (name for name in names if name.startswith(prefix)):
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                folders.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                found.append(name)
        contents = "".join(
            f"<Contents><Key>{escape(name)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>x</ETag><Size>{len(self.store.objects[f'{bucket}/{name}'])}</Size></Contents>"
            for name in found
        )
        common = "".join(f"<CommonPrefixes><Prefix>{escape(each)}</Prefix></CommonPrefixes>" for each in folders)
        self._xml(
            f"<ListBucketResult><Name>{bucket}</Name><Prefix>{escape(prefix)}</Prefix><IsTruncated>false</IsTruncated>"
            f"<KeyCount>{len(found) + len(folders)}</KeyCount>{contents}{common}</ListBucketResult>"
        )

    def do_PUT(self) -> None:
        """Write an object, or a part of one."""
        key, query = self._asked()
        body = self._body()
        if key.startswith("refused/"):
            self._refuse()
        elif "uploadId" in query and self.store.failing > 0:
            self.store.failing -= 1
            self._xml("<Error><Code>SlowDown</Code><Message>not now</Message></Error>", 503)
        elif "uploadId" in query:
            self.store.uploads[query["uploadId"]][int(query["partNumber"])] = body
            self.store.parts += 1
            self._answer(200, ETag=f'"{etag(body)}"')
        elif source := self.headers.get("x-amz-copy-source"):
            self._copy(unquote(source).lstrip("/"), key)
        else:
            if "/" in key.rstrip("/"):
                self.store.objects[key] = body
            self._answer(200, ETag=f'"{etag(body)}"')

    def _copy(self, source: str, key: str) -> None:
        if not self.store.copies:
            self._xml("<Error><Code>InvalidRequest</Code><Message>The source is too large</Message></Error>", 400)
        elif source not in self.store.objects:
            self._xml("<Error><Code>NoSuchKey</Code><Message>it is not there</Message></Error>", 404)
        else:
            content = self.store.objects[key] = self.store.objects[source]
            self._xml(f"<CopyObjectResult><ETag>{etag(content)}</ETag></CopyObjectResult>")

    def do_POST(self) -> None:
        """Begin or complete an upload in parts, or delete several objects."""
        key, query = self._asked()
        body = self._body()
        bucket, _, name = key.partition("/")
        if "uploads" in query:
            upload = etag(f"{key}{len(self.store.uploads)}".encode())
            self.store.uploads[upload] = {}
            self._xml(
                f"<InitiateMultipartUploadResult><Bucket>{bucket}</Bucket><Key>{escape(name)}</Key>"
                f"<UploadId>{upload}</UploadId></InitiateMultipartUploadResult>"
            )
        elif "uploadId" in query:
            parts = self.store.uploads.pop(query["uploadId"])
            self.store.objects[key] = b"".join(parts[number] for number in sorted(parts))
            self._xml(
                f"<CompleteMultipartUploadResult><Bucket>{bucket}</Bucket><Key>{escape(name)}</Key><ETag>x</ETag>"
                "</CompleteMultipartUploadResult>"
            )
        else:
            names = [each.text or "" for each in tree.fromstring(body).iter() if each.tag.rpartition("}")[2] == "Key"]
            for each in names:
                self.store.objects.pop(f"{bucket}/{each}", None)
            self._xml("<DeleteResult></DeleteResult>")

    def do_DELETE(self) -> None:
        """Delete an object, or give an upload up."""
        key, query = self._asked()
        if "uploadId" in query:
            self.store.uploads.pop(query["uploadId"], None)
        else:
            self.store.objects.pop(key, None)
        self._answer(204)
