"""How long clients may take, and how much they may send, before anything of theirs is looked at. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Overdue = Literal["head", "body", "reader", "closing"]
"""What a connection takes too long with: a request's head, its body, reading an answer, or reading the last bytes."""


@dataclass(frozen=True)
class Limits:
    """The bounds of one server."""

    head_s: float = 10.0
    """From accepting a connection, or a head's first byte, to the end of the head."""
    body_s: float = 10.0
    """Longest pause in a body, and the time after which its rate counts."""
    body_bytes_per_s: float = 512.0
    """Slowest rate of a body, over all of it."""
    whole_body_s: float = 30.0
    whole_body_bytes_per_s: float = 64 * 1024.0
    """A whole body may take so long, and a second more for so many of its bytes."""
    idle_s: float = 75.0
    """From an answer to the next request's first byte."""
    reader_s: float = 60.0
    """How long a client may leave an answer unread."""
    head_bytes: int = 32 * 1024
    url_bytes: int = 8 * 1024
    headers: int = 100
    connections: int = 10_000
    """Open connections of one gateway; further ones are told to come again."""


@dataclass
class Pace:
    """What a connection's client is at, as times of the loop's clock; None: not at it."""

    head_since: float | None = None
    body_since: float | None = None
    body_moved: float = 0.0
    """When the body's last bytes came."""
    body_bytes: int = 0
    unread_since: float | None = None
    """Since when more of an answer is unread than is kept for a client."""
    closing_since: float | None = None

    def hold(self, seconds: float) -> None:
        """Leave out of the body's time what the server did not read by its own choice."""
        if self.body_since is not None:
            self.body_since += seconds
            self.body_moved += seconds


def overdue(pace: Pace, now: float, answering: bool, limits: Limits) -> Overdue | None:
    """Return what takes too long.

    Args:
        answering: whether a request of the connection is being answered; the next one's head may wait meanwhile.
    """
    if pace.closing_since is not None and now - pace.closing_since > limits.head_s:
        return "closing"
    if pace.unread_since is not None and now - pace.unread_since > limits.reader_s:
        return "reader"
    if pace.head_since is not None and not answering and now - pace.head_since > limits.head_s:
        return "head"
    return "body" if pace.body_since is not None and _body_is_slow(pace, pace.body_since, now, limits) else None


def _body_is_slow(pace: Pace, since: float, now: float, limits: Limits) -> bool:
    if now - max(since, pace.body_moved) > limits.body_s:
        return True
    if now - since > limits.whole_body_s + pace.body_bytes / limits.whole_body_bytes_per_s:
        return True
    return now - since > limits.body_s and pace.body_bytes < limits.body_bytes_per_s * (now - since)
