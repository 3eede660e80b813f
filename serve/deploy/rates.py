"""The rates of keys over all gateway replicas: one small actor per endpoint decides, and gateways ask it in batches.

A gateway has one question on its way at a time; what comes meanwhile goes with the next one. So one request alone costs
a round trip, and a thousand at once cost one too. While the actor cannot be reached, each gateway decides by itself,
with the whole limit: a key may then have its limit once per gateway. What is in flight at this gateway is known here
all the time, so that neither side goes on from numbers of before. Tokens that were reserved at the actor, and whose
request ends while it is away, are not given back: its bucket fills by itself within a minute.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from serve.deploy.state_actor import NAMESPACE
from serve.keys.limiter import Limiter, Verdict
from serve.keys.limits import Limits

logger = logging.getLogger(__name__)

ASK_TIMEOUT_S = 1.0
BEAT_S = 1.0
"""How often a gateway tells what it has in flight, so that a new actor learns it and a dead gateway is noticed."""
AWAY_S = 2.0
"""How long a gateway decides by itself after the actor did not answer."""


class Ask(NamedTuple):
    """One request that wants to begin."""

    key: str
    limits: Limits
    tokens: int


class End(NamedTuple):
    """One request that has ended."""

    key: str
    reserved: int
    used: int


class RatesActor:
    """The actor: the one Limiter of an endpoint."""

    def __init__(self) -> None:
        self._limiter = Limiter()
        self._tidied = time.monotonic()

    def exchange(self, gateway: str, ends: list[End], asks: list[Ask], running: dict[str, int] | None) -> list[Verdict]:
        """Take what has ended, decide what may begin; `running`: what the gateway has in flight, once a second."""
        now = time.monotonic()
        for end in ends:
            self._limiter.end(now, gateway, *end)
        if running is not None:
            self._limiter.heard(now, gateway, running)
        if now - self._tidied > 10 * BEAT_S:
            self._limiter.forget_idle(now)
            self._tidied = now
        return [self._limiter.begin(now, gateway, *ask) for ask in asks]


class SharedRates:
    """A gateway's way to the actor. Its methods are called on one event loop."""

    def __init__(self, name: str, gateway: str) -> None:
        self._name, self._gateway = name, gateway
        self._actor: Any = None
        self._asks: list[tuple[Ask, asyncio.Future[Verdict]]] = []
        self._ends: list[End] = []
        self._running: Counter[str] = Counter()
        """Requests of each key with limits that were admitted here and have not ended, whoever admitted them."""
        self._told = 0.0
        """When the actor last heard of them; 0: it must hear them next."""
        self._heard: dict[str, int] | None = {}
        """What it heard then, None where that is not known: that nothing is in flight any more is told once, too."""
        self._alone = Limiter()
        self._away_until = 0.0
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to ask and to tell."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    def stop(self) -> None:
        """Stop; what waits is decided here."""
        if self._task is not None:
            self._task.cancel()
        self._decide_alone(self._taken())

    async def begin(self, key: str, limits: Limits, tokens: int) -> Verdict:
        """Decide about one request that could use `tokens` tokens."""
        if (limits.requests_per_minute, limits.tokens_per_minute, limits.concurrency) == (None, None, None):
            return Verdict(None, 0.0, 0, None, None)
        answer: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
        self._asks.append((Ask(key, limits, tokens), answer))
        self._wake.set()
        try:
            return await answer
        except asyncio.CancelledError:
            if answer.done() and not answer.cancelled() and answer.result().refused_by is None:
                self.end(key, answer.result().reserved, 0)
            raise

    def end(self, key: str, reserved: int, used: int) -> None:
        """Take note that a request has ended."""
        if self._running[key] > 0:
            self._running[key] -= 1
            self._ends.append(End(key, reserved, used))

    async def _run(self) -> None:
        while True:
            if not self._asks:
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), BEAT_S)
            self._wake.clear()
            now = time.monotonic()
            running = dict(+self._running) if now - self._told >= BEAT_S else None
            self._told = self._told if running is None else now
            if self._asks or self._ends or (running is not None and (running or self._heard != {})):
                await self._exchange(self._taken(), running)

    def _taken(self) -> list[tuple[Ask, asyncio.Future[Verdict]]]:
        asks, self._asks = self._asks, []
        return asks

    async def _exchange(self, asks: list[tuple[Ask, asyncio.Future[Verdict]]], running: dict[str, int] | None) -> None:
        ends, self._ends = self._ends, []
        try:
            verdicts = await self._asked(ends, [ask for ask, _ in asks], running)
        except Exception as error:
            if time.monotonic() >= self._away_until:
                logger.warning("rates are counted by this gateway alone for a while: %s", type(error).__name__)
                self._away_until = time.monotonic() + AWAY_S
            self._actor, self._told, self._heard = None, 0.0, None
            self._decide_alone(asks, ends)
            return
        self._heard = self._heard if running is None else running
        for (ask, answer), verdict in zip(asks, verdicts, strict=True):
            if not answer.done():
                self._answer(ask, answer, verdict)
            elif verdict.refused_by is None:  # its client has left meanwhile
                self._ends.append(End(ask.key, verdict.reserved, 0))

    def _answer(self, ask: Ask, answer: asyncio.Future[Verdict], verdict: Verdict) -> None:
        self._running[ask.key] += verdict.refused_by is None
        answer.set_result(verdict)

    async def _asked(self, ends: list[End], asks: list[Ask], running: dict[str, int] | None) -> list[Verdict]:
        import ray

        if time.monotonic() < self._away_until:
            raise ConnectionError("the actor did not answer a moment ago")
        self._actor = self._actor or ray.get_actor(actor_name(self._name), namespace=NAMESPACE)
        asked = self._actor.exchange.remote(self._gateway, ends, asks, running)
        return list(await asyncio.wait_for(asked, ASK_TIMEOUT_S))

    def _decide_alone(self, asks: list[tuple[Ask, asyncio.Future[Verdict]]], ends: Sequence[End] = ()) -> None:
        now = time.monotonic()
        for end in ends:
            self._alone.end(now, "", *end)
        self._alone.heard(now, "", dict(+self._running))
        for ask, answer in asks:
            if not answer.done():
                self._answer(ask, answer, self._alone.begin(now, "", *ask))


def start(name: str, environment: dict[str, Any]) -> None:
    """Start the actor of the endpoint `name`, unless it runs. It is detached, and comes back after a failure."""
    import ray

    ray.remote(RatesActor).options(
        name=actor_name(name),
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_restarts=-1,
        runtime_env=environment,
    ).remote()


def stop(name: str) -> None:
    """End the actor of `name`, if there is one."""
    import ray

    try:
        ray.kill(ray.get_actor(actor_name(name), namespace=NAMESPACE))
    except ValueError:
        return


def actor_name(name: str) -> str:
    """Return the actor's name."""
    return f"rates:{name}"
