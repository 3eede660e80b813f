"""Reads an answer as it arrives, with as little work for each token as can be: the client shares the server's CPUs.

Events are parsed until the first text is there, and afterwards only where they hold usage or an error; the others are
counted.
"""

from __future__ import annotations

import json
import re
from array import array
from typing import Any

TELLING = re.compile(rb'"(?:usage|error)":\s*\{')
"""Inside of a JSON text a quote is escaped, so neither can be the model's own words."""
MOST_KEPT = 65_536
"""Bytes of an answer that is no stream, or an error, that are kept."""


class StreamedAnswer:
    """Server-sent events of one answer."""

    def __init__(self) -> None:
        self.first: float | None = None
        self.last: float | None = None
        self.gaps = array("f")
        self.events = 0
        self.usage: dict[str, Any] = {}
        self.error: str | None = None
        self.done = False
        """Whether `[DONE]` came."""
        self._rest = b""

    def feed(self, data: bytes, now: float) -> None:
        """Take bytes of the body that arrived at `now`."""
        whole = self._rest + data
        if b"\r" in whole:  # in JSON it is escaped
            whole = whole.replace(b"\r\n", b"\n")
        *events, self._rest = whole.split(b"\n\n")
        before = self.events
        for event in events:
            self._read(event)
        if self.events == before:
            return
        if self.first is None:
            self.first = now
        elif self.last is not None:
            self.gaps.append(now - self.last)
        self.last = now

    def end(self) -> None:
        """Take note that the body is over."""

    @property
    def whole(self) -> bool:
        """Whether nothing of it is missing."""
        return self.done and self.error is None

    def _read(self, event: bytes) -> None:
        if not event.startswith(b"data:"):
            return  # a comment, which keeps the connection open
        payload = event[5:].strip()
        if payload == b"[DONE]":
            self.done = True
        elif self.events == 0 or TELLING.search(payload):
            self._parse(payload)
        else:
            self.events += 1

    def _parse(self, payload: bytes) -> None:
        try:
            value = json.loads(payload)
        except ValueError:
            self.error = f"an event is no JSON: {payload[:80]!r}"
            return
        if value.get("error"):
            self.error = message_of(value)
        self.usage = value.get("usage") or self.usage
        self.events += any(map(has_text, value.get("choices") or ()))


class WholeAnswer:
    """An answer in one piece, or an error."""

    def __init__(self) -> None:
        self.first = self.last = None
        self.gaps = array("f")
        self.events = 0
        self.usage: dict[str, Any] = {}
        self.error: str | None = None
        self.whole = False
        self._body = bytearray()

    def feed(self, data: bytes, now: float) -> None:
        """Take bytes of the body."""
        if len(self._body) < MOST_KEPT:
            self._body += data

    def end(self) -> None:
        """Read the body, which is over."""
        try:
            value = json.loads(self._body)
        except ValueError:
            self.error = bytes(self._body[:200]).decode(errors="replace")
            return
        self.whole = isinstance(value, dict) and not value.get("error")
        self.error = None if self.whole else message_of(value)
        self.usage = (value.get("usage") or {}) if self.whole else {}
        self.value = value

    value: Any = None


Answer = StreamedAnswer | WholeAnswer


def has_text(choice: dict[str, Any]) -> bool:
    """Say whether a choice of a chunk holds text, reasoning or a call: an opening with a role alone does not."""
    delta = choice.get("delta") or {}
    told = (
        choice.get("text"),
        *(delta.get(name) for name in ("content", "reasoning_content", "reasoning", "tool_calls")),
    )
    return any(told)


def message_of(value: Any) -> str:
    """Return an error's message, whatever its shape, in at most 200 characters."""
    error = value.get("error", value) if isinstance(value, dict) else value
    message = error.get("message", error) if isinstance(error, dict) else error
    return str(message)[:200]
