"""What is known of one request when it has ended."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any

OK, CUT, UNFINISHED, RATE_LIMITED = "ok", "cut stream", "unfinished", "429"
"""Outcomes beside which there are `http 500` and the like, `time-out`, `connection` and `error in the stream`."""


@dataclass(slots=True)
class Record:
    """One request. Moments are seconds since the run began."""

    number: int
    caller: str
    intended: float
    """When it should have begun: in the open loop its arrival, else when it was sent."""
    sent: float
    outcome: str = UNFINISHED
    detail: str = ""
    """What the server or the system said of a failure."""
    status: int = 0
    first: float | None = None
    """When the first text came."""
    last: float | None = None
    """When the last text came."""
    ended: float = 0.0
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    events: int = 0
    """Events with text, or what may be text."""
    asked_prompt: int | None = 0
    """Tokens of the prompt as it was wished; None of a file's own text."""
    asked_answer: int = 0
    """Tokens of the answer that was asked for."""
    resent: bool = False
    """Whether a connection that had been kept open was closed under it, so that it was sent again."""
    gaps: array[float] = field(default_factory=lambda: array("f"))
    """Seconds between arrivals of text."""
    retry_after_s: float | None = None

    @property
    def ttft(self) -> float | None:
        """Seconds from the intended beginning to the first text."""
        return None if self.first is None else self.first - self.intended

    @property
    def tpot(self) -> float | None:
        """Seconds for each token after the first; None where fewer than two were counted."""
        if self.first is None or self.last is None or (self.completion_tokens or 0) < 2:
            return None
        return (self.last - self.first) / (self.completion_tokens - 1)  # type: ignore[operator]

    @property
    def e2e(self) -> float:
        """Seconds from the intended beginning to the end."""
        return self.ended - self.intended

    @property
    def tokens(self) -> int:
        """Tokens of prompt and answer, as the server counted them."""
        return (self.prompt_tokens or 0) + (self.completion_tokens or 0)

    def told(self) -> dict[str, Any]:
        """Return it for the results."""
        own = {name: getattr(self, name) for name in self.__slots__ if name != "gaps"}
        return {**own, "longest_gap_s": max(self.gaps, default=None)}
