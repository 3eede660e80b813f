"""Answers to what is no request that a route could answer: whole, as bytes, in OpenAI's shape."""

from __future__ import annotations

import http
import json
from dataclasses import dataclass

from serve.api.body import ApiError
from serve.front.limits import Limits, Overdue


@dataclass(frozen=True)
class Refusal:
    """What a client is told before its connection is closed."""

    status: int
    message: str
    code: str
    retry_after_s: int | None = None

    def raw(self, request_id: str) -> bytes:
        """Return the answer with its head."""
        body = self.body()
        phrase = http.HTTPStatus(self.status).phrase
        retry = f"retry-after: {self.retry_after_s}\r\n" if self.retry_after_s else ""
        head = (
            f"HTTP/1.1 {self.status} {phrase}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            f"{retry}x-request-id: {request_id}\r\nconnection: close\r\n\r\n"
        )
        return head.encode("ascii") + body

    def body(self) -> bytes:
        """Return the answer's body."""
        return json.dumps(ApiError(self.status, self.message, code=self.code).body()).encode()

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return the headers for a server that writes the head itself."""
        retry = [(b"retry-after", str(self.retry_after_s).encode())] if self.retry_after_s else []
        length = str(len(self.body())).encode()
        return [(b"content-type", b"application/json"), (b"content-length", length), (b"connection", b"close"), *retry]


NO_HTTP = Refusal(400, "this is no valid HTTP/1.1 request", "invalid_request")
TOO_MANY = Refusal(503, "this gateway has as many connections as it takes; try again", "too_many_connections", 1)


def too_slow(what: Overdue, limits: Limits) -> Refusal:
    """Return the answer to a client whose request does not come to its end."""
    if what == "head":
        return Refusal(408, f"the request's head did not come within {limits.head_s:g} s", "request_timeout")
    message = (
        f"the request's body came too slowly: no pause may be longer than {limits.body_s:g} s, "
        f"{limits.body_bytes_per_s:g} bytes a second are the least, and in all it may take {limits.whole_body_s:g} s "
        f"and a second for each {limits.whole_body_bytes_per_s:g} bytes"
    )
    return Refusal(408, message, "request_timeout")


def long_url(limits: Limits) -> Refusal:
    """Return the answer to a URL that is longer than any of ours."""
    return Refusal(414, f"the URL is longer than {limits.url_bytes} bytes", "url_too_long")


def large_head(limits: Limits) -> Refusal:
    """Return the answer to headers that are too many, or too long."""
    message = f"the headers are more than {limits.headers}, or longer than {limits.head_bytes} bytes in all"
    return Refusal(431, message, "headers_too_large")
