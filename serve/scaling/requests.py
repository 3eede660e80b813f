"""How many replicas the gateway needs, from the requests that it answers now. Pure."""

from __future__ import annotations

import math

from serve.scaling.policy import NOTHING
from serve.scaling.steps import Bounds, Decision, Need, Steps

OPEN_REQUESTS = 64
"""Requests that one gateway replica shall answer at the same time, where the spec does not say."""


class RequestPolicy:
    """The policy of something whose replicas each take so many requests at the same time."""

    def __init__(self, bounds: Bounds, each: float, target: int | None = None) -> None:
        """`each`: requests that one replica shall have."""
        self.steps = Steps(bounds, target)
        self.each = each

    def decide(self, now: float, requests: int) -> Decision:
        """Take the number of open requests and return how many replicas there shall be."""
        needed = math.ceil(requests / self.each - NOTHING)
        return self.steps.settle(now, Need(needed, "requests", f"{requests:,} open requests, {self.each:g} a replica"))
