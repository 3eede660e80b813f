"""The last numbers of gateways that have ended, kept until every scraper has seen them.

A scraper comes every 10 to 60 s. What a gateway counted after the last visit would be lost with it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from serve.wire import GatewayState

KEPT_S = 300.0
MOST = 32


@dataclass(frozen=True)
class LeftGateway:
    """The last numbers of a gateway that is gone."""

    metrics: dict[str, Any]


class Departed:
    """The last reports of gateways that left, the newest at the end."""

    def __init__(self) -> None:
        self._left: deque[tuple[float, LeftGateway]] = deque(maxlen=MOST)

    def add(self, now: float, report: Any) -> None:
        """Keep what a sender told last, where it is a gateway that counted something."""
        if isinstance(report, GatewayState) and report.metrics:
            self._left.append((now, LeftGateway(report.metrics)))

    def told(self, now: float) -> list[tuple[float, dict[str, Any]]]:
        """Return each one's age in seconds and numbers, as plain data for whoever takes over."""
        return [(now - at, left.metrics) for at, left in self._left]

    def take(self, now: float, told: Iterable[tuple[float, dict[str, Any]]]) -> None:
        """Take what `told` returned elsewhere, in front of what is here already."""
        taken = ((now - age_s, LeftGateway(metrics)) for age_s, metrics in told)
        self._left = deque([*taken, *self._left], maxlen=MOST)

    def read(self, now: float) -> list[LeftGateway]:
        """Return those of the last minutes, and forget the others."""
        while self._left and now - self._left[0][0] > KEPT_S:
            self._left.popleft()
        return [left for _, left in self._left]
