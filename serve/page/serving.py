"""Static files of the playground over HTTP: a fixed list, read once, with an ETag and a strict content policy.

They are the same for everyone and hold no data, so they are open where keys are required: the page asks for a key
itself. What is not in the list is not there: no path of a request ever reaches the file system.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fastapi.responses import Response

FOLDER = Path(__file__).parent / "static"
INDEX = "index.html"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
FILES = (
    *("page.css", "controls.css", "icon.svg", "theme.js", "app.js", "api.js", "ask.js", "chat.js", "completion.js"),
    *("curl.js", "dom.js", "errors.js", "forms.js", "key.js", "results.js", "settings.js", "store.js", "stream.js"),
    "tensors.js",
)
"""What the page loads, below `/page/`."""
PATHS = ("/", *(f"/page/{name}" for name in FILES))
"""Every path that is answered here."""

POLICY = (
    "default-src 'self'; img-src 'self' blob:; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
"""No inline script or style, nothing from elsewhere, no frame around it, and no text that a browser takes for HTML."""
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",  # kept, and asked for again by its ETag: the files of one page belong together
}


@dataclass(frozen=True)
class File:
    """One static file."""

    content: bytes
    media_type: str
    etag: str


@cache
def files() -> Mapping[str, File]:
    """Return every file by its path in a URL."""
    return {path: _read(path.removeprefix("/page/").strip("/") or INDEX) for path in PATHS}


def answer(file: File, if_none_match: str | None) -> Response:
    """Return the response to a request for a file: 304 without content where the browser has this very content."""
    headers = {**HEADERS, "etag": file.etag}
    if if_none_match is not None and _matches(file.etag, if_none_match):
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)


def _read(name: str) -> File:
    content = (FOLDER / name).read_bytes()
    return File(content, TYPES[Path(name).suffix], f'"{hashlib.sha256(content).hexdigest()[:24]}"')


def _matches(etag: str, if_none_match: str) -> bool:
    """Compare weakly, as If-None-Match asks."""
    sent = [one.strip().removeprefix("W/") for one in if_none_match.split(",")]
    return "*" in sent or etag in sent
