"""Rates and concurrency of keys: what admission asks, and the answer of a gateway that is the only one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from serve.keys.limiter import Limiter, Verdict
from serve.keys.limits import Limits


class Rates(Protocol):
    """Rates and concurrency, over all gateways."""

    async def begin(self, key: str, limits: Limits, tokens: int, texts: int) -> Verdict:
        """Decide about one request for so many texts that could use `tokens` tokens."""
        ...

    def end(self, key: str, reserved: int, used: int, texts: int) -> None:
        """Take note that it has ended."""
        ...


class OwnRates:
    """The rates of a gateway that is the only one."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._limiter, self._clock = Limiter(), clock

    async def begin(self, key: str, limits: Limits, tokens: int, texts: int) -> Verdict:
        return self._limiter.begin(self._clock(), "", key, limits, tokens, texts)

    def end(self, key: str, reserved: int, used: int, texts: int) -> None:
        self._limiter.end(self._clock(), "", key, reserved, used, texts)
