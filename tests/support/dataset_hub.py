"""A hub on this machine with one data set: what its client asks to list files, and to get ranges of them."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "89abcdef0123456789abcdef0123456789abcdef"


def _about(name: str, content: bytes) -> dict[str, object]:
    digest = hashlib.sha256(content).hexdigest()
    lfs = {"oid": digest, "size": len(content), "pointerSize": 130}
    return {"type": "file", "path": name, "size": len(content), "oid": digest[:40], "lfs": lfs}


def _tree(files: Mapping[str, bytes], below: str, deep: bool) -> list[dict[str, object]]:
    """List a folder as the hub does: the folders in it too, and with `deep` what these hold."""
    inside = {name: content for name, content in files.items() if not below or name.startswith(f"{below}/")}
    folders = {"/".join(name.split("/")[:depth]) for name in inside for depth in range(1, name.count("/") + 1)}
    folders = {name for name in folders if len(name) > len(below)}
    told = [{"type": "directory", "path": name, "size": 0, "oid": "0"} for name in sorted(folders)]
    told += [_about(name, content) for name, content in inside.items()]
    begins = len(below) + 1 if below else 0
    return [each for each in told if deep or "/" not in str(each["path"])[begins:]]


@contextmanager
def served(repository: str, files: Mapping[str, bytes]) -> Iterator[tuple[str, list[int]]]:
    """Serve a data set; yield the address, and the bytes of each range of a file that is sent."""
    fetched: list[int] = []
    api = f"/api/datasets/{repository}"

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # an answer in one piece: in two, the second waits for the first one's receipt

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_POST(self) -> None:
            asked = urllib.parse.unquote(self.rfile.read(int(self.headers["Content-Length"])).decode())
            told = [
                _about(name, content) for name, content in files.items() if json.dumps(name) in asked or name in asked
            ]
            self._answer(200, json.dumps(told).encode())

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            name = path.removeprefix(f"/datasets/{repository}/resolve/{COMMIT}/")
            if path.startswith(f"{api}/tree/"):
                below = path.removeprefix(f"{api}/tree/{COMMIT}").strip("/")
                told = _tree(files, below, "recursive=true" in self.path)
                self._answer(200, json.dumps(told).encode())
            elif path.startswith(api):
                self._answer(200, json.dumps({"id": repository, "sha": COMMIT, "siblings": []}).encode())
            elif name in files:
                span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                part = files[name][int(span[1]) : int(span[2]) + 1] if span else files[name]
                if self.command == "GET":
                    fetched.append(len(part))
                self._answer(206 if span else 200, part)
            else:
                self._answer(404, b"")

        def _answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Repo-Commit", COMMIT)
            if status == 404:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", fetched
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
