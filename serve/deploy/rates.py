"""The rates of keys over all gateway replicas: one small actor per endpoint decides, and gateways ask it in batches.

A gateway has one question on its way at a time; what comes meanwhile goes with the next one. So one request alone costs
a round trip, and a thousand at once cost one too. While the actor cannot be reached, each gateway decides by itself,
from where the key stood when it asked last: a key's rates may then fill once per gateway. What is in flight at this
gateway is known here all the time, so that neither side goes on from numbers of before. Tokens that were reserved at
the actor, and whose request ends while it is away, are not given back: its bucket fills by itself within a minute.

Where `serve up` has another actor take over (serve/deploy/succession.py), gateways follow it without a pause. Gateways
of another version of Tandem, which live until they are replaced, may not know the shape of its questions: they count
alone, and what is in flight at them, which is told in plain numbers, counts here all the same.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from serve.deploy import succession
from serve.deploy.shapes import Stranger, seal, shape_of, unseal
from serve.deploy.succession import Generation, Moved, Say
from serve.keys.limiter import NO_LIMITS, Limiter, Rate, RateLimits, Verdict
from serve.keys.limits import Limits

logger = logging.getLogger(__name__)

ASK_TIMEOUT_S = 1.0
BEAT_S = 1.0
"""How often a gateway tells what it has in flight, so that a new actor learns it and a dead gateway is noticed."""
TIDY_S = 10.0
"""How often keys are forgotten that are as new ones."""
MOST_MOVES = 3
"""An actor that has moved on, one that has died meanwhile, and the one that answers."""
AWAY_S = 2.0
"""How long a gateway decides by itself after the actor did not answer."""


class Ask(NamedTuple):
    """One request that wants to begin."""

    key: str
    limits: RateLimits
    tokens: int
    texts: int = 1


class End(NamedTuple):
    """One request that has ended."""

    key: str
    reserved: int
    used: int
    texts: int = 1


SHAPE = shape_of(Ask, RateLimits, End, Verdict, Rate)
"""Of what gateways ask, and of what they are answered."""
KNOWN_FORMAT = 1
"""Of what one actor hands over to the next."""


class StrangeShape(Exception):
    """The actor is of another version of Tandem, and does not know what this gateway asks."""


class RatesActor:
    """The actor: the one Limiter of an endpoint. Its methods run one after the other."""

    def __init__(self, version: str = "") -> None:
        """`version`: of the code that runs here."""
        self._version = version
        self._moved: Moved | None = None
        self._limiter = Limiter()
        self._tidied = time.monotonic()

    def exchange(
        self, gateway: str, shape: str, sealed: bytes, running: dict[str, int] | None
    ) -> bytes | Moved | Stranger:
        """Take what has ended, decide what may begin.

        Args:
            sealed: the ends and the asks.
            running: what the gateway has in flight, by key, once a second.

        Returns:
            The verdicts, sealed; or whom to ask instead, or that this actor does not know the questions' shape.
        """
        if self._moved is not None:
            return self._moved
        now = time.monotonic()
        ends, asks = unseal(sealed) if shape == SHAPE else ([], [])
        for end in ends:
            self._limiter.end(now, gateway, *end)
        if running is not None:
            self._limiter.heard(now, gateway, running)
        if now - self._tidied > TIDY_S:
            self._limiter.forget_idle(now)
            self._tidied = now
        return seal([self._limiter.begin(now, gateway, *ask) for ask in asks]) if shape == SHAPE else Stranger(SHAPE)

    def generation(self) -> Generation:
        """Say which code runs here, and whether another actor has taken over."""
        return Generation(self._version, self._moved is not None)

    def hand_over(self, to: str) -> dict[str, Any]:
        """Return what is known here, as plain data; the actor called `to` is the one to ask from now on."""
        self._moved = Moved(to)
        return {"format": KNOWN_FORMAT, "limiter": self._limiter.told(time.monotonic())}

    def take_over(self, predecessor: Any, name: str) -> bool:
        """Take what the predecessor knows; `name` is this actor's. Tells whether it could be read.

        Nothing is decided meanwhile: questions that come wait for the end of this.
        """
        import ray

        told = ray.get(predecessor.hand_over.remote(name), timeout=succession.ANSWER_S)
        if told.get("format") != KNOWN_FORMAT:
            logger.warning("what the actor before has handed over has another format: it is left out")
            return False
        self._limiter.take(time.monotonic(), told["limiter"])
        return True


class SharedRates:
    """A gateway's way to the actor. Its methods are called on one event loop."""

    def __init__(self, name: str, gateway: str) -> None:
        self._name, self._gateway = name, gateway
        self._actor: Any = None
        self._asks: list[tuple[Ask, asyncio.Future[Verdict]]] = []
        self._ends: list[End] = []
        self._running: Counter[str] = Counter()
        """Texts of each key with limits that were admitted here and have not ended, whoever admitted them."""
        self._told = 0.0
        """When the actor last heard of them; 0: it must hear them next."""
        self._heard: dict[str, int] | None = {}
        """What it heard then, None where that is not known: that nothing is in flight any more is told once, too."""
        self._alone = Limiter()
        """What decides while the actor is away; until then it follows what that says."""
        self._tidied = time.monotonic()
        self._away_until = 0.0
        self._is_strange = False
        """Whether the actor was of another version when it was asked last."""
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

    async def begin(self, key: str, limits: Limits, tokens: int, texts: int = 1) -> Verdict:
        """Decide about one request for so many texts that could use `tokens` tokens."""
        bounds = RateLimits.of(limits)
        if bounds == NO_LIMITS:
            return Verdict(None, 0.0, 0, None, None)
        answer: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
        self._asks.append((Ask(key, bounds, tokens, texts), answer))
        self._wake.set()
        try:
            return await answer
        except asyncio.CancelledError:
            if answer.done() and not answer.cancelled() and answer.result().refused_by is None:
                self.end(key, answer.result().reserved, 0, texts)
            raise

    def end(self, key: str, reserved: int, used: int, texts: int = 1) -> None:
        """Take note that a request has ended."""
        if self._running[key] > 0:
            self._running[key] -= texts
            self._ends.append(End(key, reserved, used, texts))

    async def _run(self) -> None:
        while True:
            if not self._asks:
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), BEAT_S)
            self._wake.clear()
            now = time.monotonic()
            if now - self._tidied > TIDY_S:
                self._alone.forget_idle(now)
                self._tidied = now
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
            self._is_away(error)
            self._actor, self._told, self._heard = None, 0.0, None
            self._decide_alone(asks, ends)
            return
        self._heard = self._heard if running is None else running
        now = time.monotonic()
        for (ask, answer), verdict in zip(asks, verdicts, strict=True):
            self._alone.know(now, ask.key, verdict)
            if not answer.done():
                self._answer(ask, answer, verdict)
            elif verdict.refused_by is None:  # its client has left meanwhile
                self._ends.append(End(ask.key, verdict.reserved, 0, ask.texts))

    def _is_away(self, error: Exception) -> None:
        if time.monotonic() < self._away_until:
            return
        self._away_until = time.monotonic() + AWAY_S
        if not isinstance(error, StrangeShape):
            logger.warning("rates are counted by this gateway alone for a while: %s", type(error).__name__)
        elif not self._is_strange:  # it is for as long as this gateway lives, or that actor
            logger.warning("rates are counted by this gateway alone: %s", error)
        self._is_strange = isinstance(error, StrangeShape)

    def _answer(self, ask: Ask, answer: asyncio.Future[Verdict], verdict: Verdict) -> None:
        self._running[ask.key] += ask.texts * (verdict.refused_by is None)
        answer.set_result(verdict)

    async def _asked(self, ends: list[End], asks: list[Ask], running: dict[str, int] | None) -> list[Verdict]:
        if time.monotonic() < self._away_until:
            raise ConnectionError("the actor did not answer a moment ago")
        question = (self._gateway, SHAPE, seal((ends, asks)), running)
        answer = await self._answer_of(question)
        if isinstance(answer, Stranger):
            raise StrangeShape(
                f"their actor is of another version of Tandem and does not know the shape of what this gateway asks "
                f"({SHAPE}, there {answer.shape}), until `tandem serve up` has replaced one of them"
            )
        verdicts: list[Verdict] = unseal(answer)
        return verdicts

    async def _answer_of(self, question: tuple[Any, ...]) -> Any:
        """Ask the actor; where it is gone or has moved, the one in its place."""
        from ray.exceptions import ActorDiedError

        deadline = time.monotonic() + ASK_TIMEOUT_S
        for _ in range(MOST_MOVES):
            if self._actor is None:
                self._actor = await asyncio.to_thread(succession.find, base(self._name))
            if self._actor is None:
                raise ConnectionError("there is no actor")
            asked = self._actor.exchange.remote(*question)
            try:
                answer = await asyncio.wait_for(asked, deadline - time.monotonic())
            except ActorDiedError:  # its successor knows what was decided, and not this question
                self._actor = None
                continue
            if not isinstance(answer, Moved):
                return answer
            self._actor = await asyncio.to_thread(succession.named, answer.to)
        raise ConnectionError("the actor moves")

    def _decide_alone(self, asks: list[tuple[Ask, asyncio.Future[Verdict]]], ends: Sequence[End] = ()) -> None:
        now = time.monotonic()
        for end in ends:
            self._alone.end(now, "", *end)
        self._alone.heard(now, "", dict(+self._running))
        for ask, answer in asks:
            if not answer.done():
                self._answer(ask, answer, self._alone.begin(now, "", *ask))


def start(name: str, environment: dict[str, Any], say: Say) -> None:
    """Start the actor of the endpoint `name`, unless it runs this code. It comes back after a failure."""
    import ray

    def begin(actor_name: str, predecessor: Any | None) -> Any:
        options = succession.options(actor_name, environment)
        return ray.remote(RatesActor).options(**options).remote(succession.code_version())

    succession.ensure(base(name), begin, say)


def stop(name: str) -> None:
    """End the actor of `name`, if there is one."""
    succession.stop(base(name))


def base(name: str) -> str:
    """Return what the actor's names begin with."""
    return f"rates:{name}"
