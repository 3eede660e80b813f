"""Rates and concurrency of keys over all gateway replicas: the decision, without clocks, actors or sockets.

A rate is a token bucket: it holds what a minute allows, and fills evenly. Tokens are reserved when a request is
admitted (what it could use: an estimate of its prompt and the most it may generate, as OpenAI counts) and what was not
used comes back when it ends. Concurrency counts texts: a request for eight (`n`, a list of prompts) takes eight places
among those that run, and eight of its key's. Every method takes the time in seconds of any steady clock.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from serve.keys.limits import Limits

GATEWAY_SILENT_S = 5.0
"""The requests of a gateway that has said nothing for so long have ended with it."""
MINUTE_S = 60.0
LOOK_AGAIN_S = 1.0
"""When a request that its key's concurrency refuses may be tried again: how long the others run is not known."""


class RateLimits(NamedTuple):
    """Of a key's limits, those that are decided here; None: there is none."""

    requests_per_minute: int | None
    tokens_per_minute: int | None
    concurrency: int | None

    @classmethod
    def of(cls, limits: Limits) -> RateLimits:
        """Return them."""
        return cls(limits.requests_per_minute, limits.tokens_per_minute, limits.concurrency)


NO_LIMITS = RateLimits(None, None, None)


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
    """Infinite for a request that can never be admitted."""
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
    """Texts in flight by gateway."""


class Limiter:
    """The buckets of all keys with limits, and which gateway has how many of their texts in flight."""

    def __init__(self) -> None:
        self._keys: dict[str, _Key] = {}
        self._heard: dict[str, float] = {}

    def begin(
        self, now: float, gateway: str, key: str, limits: Limits | RateLimits, tokens: int, texts: int = 1
    ) -> Verdict:
        """Decide about one request for so many texts that could use `tokens` tokens, and reserve what it needs.

        One for more texts than the key's concurrency can never be admitted: it would have to wait for ever.
        """
        self._heard[gateway] = now
        state = self._keys.setdefault(key, _Key())
        state.requests = _filled(state.requests, limits.requests_per_minute, now)
        state.tokens = _filled(state.tokens, limits.tokens_per_minute, now)
        # A request above a whole minute's tokens is admitted when the bucket is full, or it could never be.
        wanted = min(tokens, state.tokens.limit) if state.tokens else 0
        waits = {
            "requests_per_minute": state.requests.wait_s(1) if state.requests else 0.0,
            "tokens_per_minute": state.tokens.wait_s(wanted) if state.tokens else 0.0,
            "concurrency": _until_room_s(sum(state.running.values()), texts, limits.concurrency),
        }
        refused_by = max(waits, key=lambda name: waits[name]) if any(waits.values()) else None
        if refused_by is None:
            self._take(state, gateway, wanted, texts)
        requests, tokens_left = (bucket.rate() if bucket else None for bucket in (state.requests, state.tokens))
        wait_s, reserved = (waits[refused_by], 0) if refused_by else (0.0, wanted)
        return Verdict(refused_by, wait_s, reserved, requests, tokens_left)

    def end(self, now: float, gateway: str, key: str, reserved: int, used: int, texts: int = 1) -> None:
        """Take note that a request has ended, and correct what was reserved to what it used."""
        self._heard[gateway] = now
        state = self._keys.get(key)
        if state is None:
            return
        state.running[gateway] = max(0, state.running.get(gateway, 0) - texts)
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

    def know(self, now: float, key: str, verdict: Verdict) -> None:
        """Take how another limiter, which decides, says that a key stands: to go on from there without it."""
        state = self._keys.setdefault(key, _Key())
        state.requests, state.tokens = (
            None if rate is None else Bucket(rate.limit, rate.remaining, now)
            for rate in (verdict.requests, verdict.tokens)
        )

    def forget_idle(self, now: float) -> None:
        """Drop keys with nothing in flight and full buckets: they are as new ones."""
        for name, state in list(self._keys.items()):
            buckets = [bucket for bucket in (state.requests, state.tokens) if bucket]
            for bucket in buckets:
                bucket.fill(now, bucket.limit)
            if not any(state.running.values()) and all(bucket.level >= bucket.limit for bucket in buckets):
                del self._keys[name]

    def told(self, now: float) -> dict[str, Any]:
        """Return everything as plain data, for a limiter elsewhere, whose clock is another one."""
        keys = {
            name: {"requests": _told(state.requests, now), "tokens": _told(state.tokens, now), "running": state.running}
            for name, state in self._keys.items()
        }
        return {"keys": keys, "silent_s": {gateway: now - at for gateway, at in self._heard.items()}}

    def take(self, now: float, told: Mapping[str, Any]) -> None:
        """Go on from what `told` returned elsewhere a moment ago."""
        for name, key in told["keys"].items():
            self._keys[name] = _Key(_taken(key["requests"], now), _taken(key["tokens"], now), dict(key["running"]))
        self._heard.update({gateway: now - silent_s for gateway, silent_s in told["silent_s"].items()})

    def __len__(self) -> int:
        return len(self._keys)

    def _take(self, state: _Key, gateway: str, tokens: int, texts: int) -> None:
        state.running[gateway] = state.running.get(gateway, 0) + texts
        if state.requests:
            state.requests.level -= 1
        if state.tokens:
            state.tokens.level -= tokens


def _until_room_s(running: int, texts: int, most: int | None) -> float:
    """Return when to look again whether there is room for so many texts: 0 where there is, for ever where never."""
    if most is None or running + texts <= most:
        return 0.0
    return LOOK_AGAIN_S if texts <= most else math.inf


def _told(bucket: Bucket | None, now: float) -> tuple[int, float] | None:
    if bucket is None:
        return None
    bucket.fill(now, bucket.limit)
    return bucket.limit, bucket.level


def _taken(told: tuple[int, float] | None, now: float) -> Bucket | None:
    return None if told is None else Bucket(limit=told[0], level=told[1], at=now)


def _filled(bucket: Bucket | None, limit: int | None, now: float) -> Bucket | None:
    if limit is None:
        return None
    bucket = bucket or Bucket(limit, limit, now)
    bucket.fill(now, limit)
    return bucket
