"""One request and its answer, as the front knows it: what the log says of it, and what ends it early."""

from __future__ import annotations

import asyncio
import random
import re
import secrets
import time
import weakref
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

SCOPE_KEY = "tandem.exchange"
LEAST_WAIT_S = 1.0
REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
"""What a client may name its request: nothing that would be something else in a log, a header or a page."""
TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}")
"""W3C Trace Context, version 00."""
Cut = Literal["gone", "expired", "leaving"]
"""The client has left, its time is over, or the gateway leaves and has waited as long as it may."""


@dataclass
class Exchange:
    """One request. The routes add what only they know."""

    request_id: str = field(default_factory=lambda: f"req-{random.getrandbits(96):024x}")
    is_made: bool = True
    """Whether the id was made here, and is nobody else's."""
    method: str = ""
    client: str = ""
    trace: str | None = None
    """The `traceparent` that goes on to a model's replica."""
    trace_state: str | None = None
    """The `tracestate` beside it, as the client sent it."""
    template: str | None = None
    """The route's path, without the names in it."""
    status: int | None = None
    model: str | None = None
    key: str | None = None
    prompt_tokens: int | None = None
    generated_tokens: int | None = None
    at: float = field(default_factory=time.time)
    began: float = field(default_factory=time.monotonic)
    ended: float | None = None
    waited_s: float | None = None
    """For its turn, once it had it."""
    first_token: float | None = None
    expires: float | None = None
    """When it is ended, on the clock of `began`."""
    cut: Cut | None = None
    """Why it was ended before its time."""
    refusal: str | None = None
    """The code of the error that the server told in place of the routes."""
    is_counted: bool = False
    """Whether the metrics have it."""
    task: asyncio.Task[Any] | None = None
    _when_worked: weakref.WeakMethod[Callable[[str], None]] | None = None

    @property
    def call_id(self) -> str:
        """An id for what an engine is asked: a client's own may come twice at the same time."""
        return self.request_id if self.is_made else f"{self.request_id}.{secrets.token_hex(4)}"

    @property
    def carried(self) -> dict[str, Any]:
        """What a call to a replica is told of the trace."""
        return {"trace": self.trace, "trace_state": self.trace_state}

    def patience_s(self, most_s: float) -> float:
        """Return how long this request may still wait: for its turn and then for a replica at most `most_s` in all.

        One that has had its turn may wait for LEAST_WAIT_S in any case.
        """
        left_s = min(most_s, max(LEAST_WAIT_S, most_s - (self.waited_s or 0.0)))
        return left_s if self.expires is None else max(0.0, min(left_s, self.expires - time.monotonic()))

    def end(self, why: Cut) -> None:
        """End what works on the answer, so that all it holds is freed."""
        if self.task is not None and self.cut is None:
            self.cut = why
            self.task.cancel()

    def when_worked(self, tell: Callable[[str], None]) -> None:
        """Have a method called, while its object is there, with the id of each call that a replica is done with."""
        self._when_worked = weakref.WeakMethod(tell)

    def worked(self, call_id: str) -> None:
        """Take note that a replica is done with a call, though the client may not have read all of it yet."""
        if self._when_worked is not None and (tell := self._when_worked()) is not None:
            tell(call_id)

    def generated(self, tokens: int) -> None:
        """Take note of all tokens that were generated so far."""
        if self.first_token is None:
            self.first_token = time.monotonic()
        self.generated_tokens = tokens

    def record(self) -> dict[str, Any]:
        """Return the log's line. It has nothing of the prompt, nor of the answer."""
        ended = time.monotonic() if self.ended is None else self.ended
        line = {
            "time": round(self.at, 3),
            "request_id": self.request_id,
            "client": self.client or None,
            "method": self.method or None,
            "path": self.template,
            "status": self.status,
            "key": self.key or None,
            "model": self.model,
            "prompt_tokens": self.prompt_tokens,
            "generated_tokens": self.generated_tokens,
            "queue_ms": None if self.waited_s is None else round(1000 * self.waited_s, 1),
            "ttft_ms": None if self.first_token is None else round(1000 * (self.first_token - self.began), 1),
            "duration_ms": round(1000 * (ended - self.began), 1),
            "trace_id": self.trace.split("-")[1] if self.trace else None,
            "cut": self.cut,
        }
        return {name: value for name, value in line.items() if value is not None}


_current: ContextVar[Exchange | None] = ContextVar("tandem_exchange", default=None)


def current() -> Exchange:
    """Return the exchange that this task works on; one of its own where no front is."""
    return _current.get() or Exchange()


def enter(exchange: Exchange) -> None:
    """Make it the current one of this task."""
    _current.set(exchange)


def begin(method: str, client: str, headers: Iterable[tuple[bytes, bytes]]) -> Exchange:
    """Return the exchange of a request: its id is the client's if that is sane, else made here."""
    exchange, states = Exchange(method=method, client=client), list[str]()
    for name, value in headers:
        if name == b"x-request-id" and exchange.is_made and REQUEST_ID.fullmatch(value):
            exchange.request_id, exchange.is_made = value.decode("ascii"), False
        elif name == b"traceparent":
            exchange.trace = traceparent(value)
        elif name == b"tracestate":
            states.append(value.decode("latin-1").strip())
    if exchange.trace is not None:  # without one it has no meaning
        exchange.trace_state = ",".join(filter(None, states)) or None
    return exchange


def traceparent(value: bytes) -> str | None:
    """Return a valid `traceparent`; None for another one, which then counts as not sent (as W3C asks)."""
    text = value.decode("latin-1").strip()
    found = TRACEPARENT.fullmatch(text)
    return text if found and found[1].strip("0") and found[2].strip("0") else None
