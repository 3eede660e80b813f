"""Rates and concurrency of keys over all gateway replicas: the decision, without clocks, actors or sockets.

A rate is a token bucket: it holds what a minute allows, and fills evenly. Tokens are reserved when a request is
admitted (what it could use: an estimate of its prompt and the most it may generate, as OpenAI counts) and what was not
used comes back when it ends. Every method takes the time in seconds of any steady clock.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from serve.keys.limits import Limits

GATEWAY_SILENT_S = 5.0
"""The requests of a gateway that has said nothing for so long have ended with it."""
MINUTE_S = 60.0


class Rate(NamedTuple):
    """How one rate stands: what `x-ratelimit-*` headers tell."""

    limit: int
    remaining: int
    reset_s: float
    """Until it is full again."""


class Verdict(NamedTuple):
    """Whether a request may begin."""

    refused_by: str | None
    """The limit's name, None when the request is admitted."""
    retry_after_s: float
    reserved: int
    """Tokens that were taken from the bucket, to give back with `Limiter.end`."""
    requests: Rate | None
    tokens: Rate | None


@dataclass
class Bucket:
    """A token bucket of `limit` a minute."""

    limit: int
    level: float
    at: float

    def fill(self, now: float, limit: int) -> None:
        """Move to `now`; a limit that has changed keeps the share that was left."""
        if limit != self.limit:
            self.level, self.limit = self.level * limit / self.limit, limit
        self.level = min(self.limit, self.level + (now - self.at) * self.limit / MINUTE_S)
        self.at = now

    def wait_s(self, amount: float) -> float:
        """Return how long until `amount` is there."""
        return max(0.0, (amount - self.level) * MINUTE_S / self.limit)

    def rate(self) -> Rate:
        """Return how it stands."""
        return Rate(self.limit, max(0, math.floor(self.level)), self.wait_s(self.limit))


@dataclass
class _Key:
    requests: Bucket | None = None
    tokens: Bucket | None = None
    running: dict[str, int] = field(default_factory=dict)
    """Requests in flight by gateway."""


class Limiter:
    """The buckets of all keys with limits, and which gateway has how many of their requests in flight."""

    def __init__(self) -> None:
        self._keys: dict[str, _Key] = {}
        self._heard: dict[str, float] = {}

    def begin(self, now: float, gateway: str, key: str, limits: Limits, tokens: int) -> Verdict:
        """Decide about one request that could use `tokens` tokens, and reserve what it needs."""
        self._heard[gateway] = now
        state = self._keys.setdefault(key, _Key())
        state.requests = _filled(state.requests, limits.requests_per_minute, now)
        state.tokens = _filled(state.tokens, limits.tokens_per_minute, now)
        # A request above a whole minute's tokens is admitted when the bucket is full, or it could never be.
        wanted = min(tokens, state.tokens.limit) if state.tokens else 0
        waits = {
            "requests_per_minute": state.requests.wait_s(1) if state.requests else 0.0,
            "tokens_per_minute": state.tokens.wait_s(wanted) if state.tokens else 0.0,
            "concurrency": 1.0 if self._is_full(state, limits) else 0.0,
        }
        refused_by = max(waits, key=lambda name: waits[name]) if any(waits.values()) else None
        if refused_by is None:
            self._take(state, gateway, wanted)
        requests, tokens_left = (bucket.rate() if bucket else None for bucket in (state.requests, state.tokens))
        wait_s, reserved = (waits[refused_by], 0) if refused_by else (0.0, wanted)
        return Verdict(refused_by, wait_s, reserved, requests, tokens_left)

    def end(self, now: float, gateway: str, key: str, reserved: int, used: int) -> None:
        """Take note that a request has ended, and correct what was reserved to what it used."""
        self._heard[gateway] = now
        state = self._keys.get(key)
        if state is None:
            return
        state.running[gateway] = max(0, state.running.get(gateway, 0) - 1)
        if state.tokens:
            state.tokens.fill(now, state.tokens.limit)
            state.tokens.level = min(state.tokens.limit, state.tokens.level + reserved - used)

    def heard(self, now: float, gateway: str, running: dict[str, int]) -> None:
        """Take what a gateway says is in flight there for true, and forget gateways that say nothing any more."""
        self._heard[gateway] = now
        for key in running:
            self._keys.setdefault(key, _Key())
        for key, state in self._keys.items():
            state.running.pop(gateway, None)
            if running.get(key):
                state.running[gateway] = running[key]
        for silent in [name for name, at in self._heard.items() if now - at > GATEWAY_SILENT_S]:
            del self._heard[silent]
            for state in self._keys.values():
                state.running.pop(silent, None)

    def forget_idle(self, now: float) -> None:
        """Drop keys with nothing in flight and full buckets: they are as new ones."""
        for name, state in list(self._keys.items()):
            buckets = [bucket for bucket in (state.requests, state.tokens) if bucket]
            for bucket in buckets:
                bucket.fill(now, bucket.limit)
            if not any(state.running.values()) and all(bucket.level >= bucket.limit for bucket in buckets):
                del self._keys[name]

    def __len__(self) -> int:
        return len(self._keys)

    def _is_full(self, state: _Key, limits: Limits) -> bool:
        return limits.concurrency is not None and sum(state.running.values()) >= limits.concurrency

    def _take(self, state: _Key, gateway: str, tokens: int) -> None:
        state.running[gateway] = state.running.get(gateway, 0) + 1
        if state.requests:
            state.requests.level -= 1
        if state.tokens:
            state.tokens.level -= tokens


def _filled(bucket: Bucket | None, limit: int | None, now: float) -> Bucket | None:
    if limit is None:
        return None
    bucket = bucket or Bucket(limit, limit, now)
    bucket.fill(now, limit)
    return bucket
