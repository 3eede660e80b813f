"""The gateway's way to the models: which replica answers, and what becomes of an answer that was lost.

Requests go straight to replicas (serve/channel): Ray Serve's controller may hang or be dead meanwhile. What replicas
tell the state actor is where gateways learn of them.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from contextlib import aclosing, contextmanager
from functools import partial
from typing import Any

from serve.api.body import ApiError
from serve.api.streaming import OtherVersion
from serve.channel.client import Busy, CallFailed
from serve.channel.pool import ANY, Full, NoReplica, Pool, Seat, VersionGone
from serve.deploy import readiness
from serve.deploy.access import Standing
from serve.deploy.names import model_app
from serve.deploy.reporting import Reader
from serve.front import exchange
from serve.routing.choose import ByPrefix, Chooser
from serve.routing.lost import ReplicaLost
from serve.routing.resuming import resumed
from serve.scaling.decisions import ScalingState
from serve.scaling.decisions import Standing as Scaling
from serve.wire import (
    Chunk,
    EmbedCall,
    GatewayState,
    GenerateCall,
    InferCall,
    Inferred,
    Opened,
    Refused,
    ReplicaState,
    Vectors,
)

logger = logging.getLogger(__name__)
TRIES = 2
"""A request that was lost with its replica before it was answered goes to another one, once: answers have no side
effects, and a request that itself ends replicas ends no more than so many."""
LOOK_S = 0.25
"""How often gateways read what replicas tell of themselves."""
Message = Opened | Chunk | Refused


class RayBackend:
    """Reaches the models of the endpoint `name`, and turns failures into answers that a client can act on."""

    def __init__(self, name: str, secret: bytes, patience_s: float, chooser: Chooser | None = None) -> None:
        """`patience_s`: how long a request waits for a replica at most."""
        self._name, self._secret, self._patience_s = name, secret, patience_s
        self._chooser = chooser or ByPrefix()
        self._reports = Reader(name)
        self._pools: dict[str, Pool] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self.pending: Counter[str] = Counter()
        """Requests of this gateway that no replica has accepted yet, by model."""
        self.went_on: Callable[[str], None] = lambda model: None
        """Called when a text of a model goes on at another replica."""

    def start(self) -> None:
        """Begin to follow which replicas there are."""
        self._tasks.append(asyncio.create_task(self._follow()))

    async def stop(self) -> None:
        """End every connection."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for pool in self._pools.values():
            await pool.close()

    # -- calls -------------------------------------------------------------------------------------------------------

    async def generate(self, model: str, call: GenerateCall, build: str | None = None) -> AsyncGenerator[Message, None]:
        """Stream one text, from replicas of `build` alone where that is named; a lost one's text goes on elsewhere."""

        def attempt(call: GenerateCall, excluded: frozenset[str], build: str | None) -> AsyncGenerator[Message, None]:
            return self.attempt(model, call, excluded, build)

        async with aclosing(resumed(attempt, call, partial(self.went_on, model), build)) as messages:
            async for message in messages:
                yield message

    async def infer(self, model: str, call: InferCall) -> Inferred | Refused:
        answer: Inferred | Refused = await self._answered(model, call)
        return answer

    async def embed(self, model: str, call: EmbedCall) -> Vectors | Refused:
        answer: Vectors | Refused = await self._answered(model, call)
        return answer

    async def attempt(
        self,
        model: str,
        call: GenerateCall | InferCall | EmbedCall,
        excluded: frozenset[str] = ANY,
        build: str | None = None,
    ) -> AsyncGenerator[Any, None]:
        """Stream the answer of one replica; closing it ends the replica's work.

        Args:
            excluded: replicas that it must not be.
            build: what it must be a replica of (`Identity.build`); None: any.

        Raises:
            ReplicaLost: the replica was lost, leaves and gave the request back, or its engine failed under a text.
            ApiError: there is no replica, none with room in time, or its code failed.
        """
        most_s = self._patience_s if build is not None else exchange.current().patience_s(self._patience_s)
        deadline = asyncio.get_running_loop().time() + most_s
        pool = self._pool(model)
        with self._pending(model) as accepted, _as_api_errors(model, call.request_id, pool):
            while True:
                patience_s = deadline - asyncio.get_running_loop().time()
                async with pool.seat(call, excluded, build, patience_s) as seat:
                    done = _Done(seat, call.request_id)
                    try:
                        async with aclosing(seat.member.link.stream(call, done)) as messages:
                            async for message in messages:
                                accepted()
                                done.begun = True
                                if isinstance(message, Refused) and message.lost:
                                    raise ReplicaLost(seat.member.link.replica_id, refused=message)
                                yield message
                        return
                    except Busy:
                        pool.refused(seat.member)

    async def _answered(self, model: str, call: InferCall | EmbedCall) -> Any:
        left = TRIES
        while True:
            try:
                async with aclosing(self.attempt(model, call)) as messages:
                    return await anext(messages)
            except ReplicaLost as lost:
                left -= not lost.moved
                if not left:
                    raise _lost(model) from lost

    @contextmanager
    def _pending(self, model: str) -> Iterator[Any]:
        """Count a request as pending until what is yielded is called, or the end."""
        waits = [model]
        self.pending[model] += 1

        def accepted() -> None:
            while waits:
                self.pending[waits.pop()] -= 1

        try:
            yield accepted
        finally:
            accepted()

    # -- replicas ----------------------------------------------------------------------------------------------------

    async def states(self) -> tuple[list[ReplicaState], Counter[str]]:
        reports = await self._reports.read()
        pending: Counter[str] = Counter()
        for report in reports:
            if isinstance(report, GatewayState):
                pending.update(report.pending)
        return [each for each in reports if isinstance(each, ReplicaState) and not each.leaving], pending

    async def standing(self) -> dict[str, Standing]:
        """Return how many replicas each model has, those that leave included, and how many gateways there are.

        A replica that leaves still has requests, which hold the turns of those that it may not take any more.
        """
        reports = await self._reports.read()
        gateways = sum(isinstance(report, GatewayState) for report in reports)
        replicas = Counter(report.model for report in reports if isinstance(report, ReplicaState))
        return {model: Standing(count, gateways) for model, count in replicas.items()}

    async def scaling(self) -> dict[str, Scaling]:
        """Return what was decided about numbers of replicas, by model and for the gateway."""
        reports = await self._reports.read()
        return next((report.standings for report in reports if isinstance(report, ScalingState)), {})

    def _pool(self, model: str) -> Pool:
        if model not in self._pools:
            pool = self._pools[model] = Pool(model, self._secret, self._chooser, self._patience_s)
            reason = partial(readiness.ask_why, model_app(self._name, model))
            self._tasks.append(asyncio.create_task(readiness.watch(pool, reason)))
        return self._pools[model]

    async def _follow(self) -> None:
        while True:
            try:
                self._heard(await self._reports.read())
            except Exception as error:  # a cluster in trouble: the connections stay
                logger.warning("which replicas there are is not known: %r", error)
            await asyncio.sleep(LOOK_S)

    def _heard(self, reports: Iterable[Any]) -> None:
        states: dict[str, list[ReplicaState]] = {model: [] for model in self._pools}
        for report in reports:
            if isinstance(report, ReplicaState):
                states.setdefault(report.model, []).append(report)
        for model, told in states.items():
            self._pool(model).heard(told)


class _Done:
    """Called when a replica is done with a call, however far its answer has been read: others may have its places."""

    def __init__(self, seat: Seat, call_id: str) -> None:
        self.begun = False
        self._seat, self._call_id, self._exchange = seat, call_id, exchange.current()

    def __call__(self) -> None:
        self._seat.release()
        link = self._seat.member.link
        if self.begun and not (link.lost or link.leaving):  # else it may go on elsewhere
            self._exchange.worked(self._call_id)


def _lost(model: str) -> ApiError:
    message = f"the replica of {model!r} that worked on this request was lost"
    return ApiError(503, message, code="replica_lost", headers={"retry-after": "1"})


@contextmanager
def _as_api_errors(model: str, request_id: str, pool: Pool) -> Iterator[None]:
    try:
        yield
    except NoReplica as error:
        raise readiness.unavailable(model, str(error), pool.start_s) from None
    except Full as error:
        message = f"{model!r} has as many requests as it takes: {error}; try again in 1 s"
        raise ApiError(429, message, code="overloaded", headers={"retry-after": "1"}) from None
    except VersionGone as error:
        message = f"the replica of {model!r} that worked on this request was lost, and {error}"
        raise OtherVersion(503, message, code="replica_lost", headers={"retry-after": "1"}) from None
    except CallFailed:
        logger.error("request %s: the replica's code failed; its log says how", request_id)
        message = f"{model!r} failed on this request; its replica's log has the reason, under {request_id:.80}"
        raise ApiError(500, message, code="engine_failed") from None
