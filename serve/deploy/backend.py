"""The gateway's way to the models: which replica answers, and what becomes of an answer that was lost."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from functools import partial
from typing import Any

from ray import serve as ray_serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

from serve.api.body import ApiError
from serve.deploy import readiness
from serve.deploy.access import Standing
from serve.deploy.names import ENGINE, model_app
from serve.deploy.state_actor import Reader
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
LOST = (ReplicaUnavailableError, RayActorError)


class RayBackend:
    """Reaches models through Serve's handles, and turns Ray's failures into answers a client can act on."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._handles: dict[str, Any] = {}
        self._reports = Reader(name)
        self.pending: Counter[str] = Counter()
        """Requests of this gateway that no replica has accepted yet, by model."""

    async def generate(self, model: str, call: GenerateCall) -> AsyncGenerator[Opened | Chunk | Refused, None]:
        with _as_api_errors(model, call.request_id):
            for left in reversed(range(TRIES)):
                begun = False
                try:
                    async with aclosing(self._generated(model, call)) as messages:
                        async for message in messages:
                            begun = True
                            yield message
                    return
                except LOST:
                    if begun or not left:
                        raise

    async def _generated(self, model: str, call: GenerateCall) -> AsyncGenerator[Opened | Chunk | Refused, None]:
        response = self._handle(model).options(stream=True).generate.remote(call)
        self.pending[model] += 1
        waiting = 1
        try:
            first = await self._bounded(model, anext(response))
            self.pending[model] -= waiting
            waiting = 0
            yield first
            async for message in response:
                yield message
        except StopAsyncIteration:
            return
        except ApiError:
            response.cancel()  # no replica has taken it
            raise
        except Exception:
            raise  # the replica's stream has ended by itself; cancelling a failed response raises its failure again
        except BaseException:
            response.cancel()  # closed or cancelled by the reader: the client is gone
            raise
        finally:
            self.pending[model] -= waiting

    async def infer(self, model: str, call: InferCall) -> Inferred | Refused:
        answer: Inferred | Refused = await self._answered(
            model, call.request_id, lambda: self._handle(model).infer.remote(call)
        )
        return answer

    async def embed(self, model: str, call: EmbedCall) -> Vectors | Refused:
        answer: Vectors | Refused = await self._answered(
            model, call.request_id, lambda: self._handle(model).embed.remote(call)
        )
        return answer

    async def _answered(self, model: str, request_id: str, ask: Callable[[], Any]) -> Any:
        with _as_api_errors(model, request_id):
            for _ in range(TRIES - 1):
                with suppress(*LOST):
                    return await self._asked(model, ask())
            return await self._asked(model, ask())

    async def _asked(self, model: str, response: Any) -> Any:
        try:
            return await self._bounded(model, response)
        except (ApiError, asyncio.CancelledError):
            response.cancel()  # no replica has taken it, or the client is gone
            raise

    async def _bounded(self, model: str, answer: Any) -> Any:
        """Await the first answer, as long as there is a replica that may give it, or one may soon come."""

        async def has_replica() -> bool:
            return any(isinstance(r, ReplicaState) and r.model == model for r in await self._reports.read())

        why = partial(readiness.ask_why, model_app(self._name, model))
        return await readiness.bounded(_awaited(answer), model, has_replica, why)

    async def states(self) -> tuple[list[ReplicaState], Counter[str]]:
        reports = await self._reports.read()
        pending: Counter[str] = Counter()
        for report in reports:
            if isinstance(report, GatewayState):
                pending.update(report.pending)
        return [report for report in reports if isinstance(report, ReplicaState)], pending

    async def standing(self) -> dict[str, Standing]:
        """Return how many replicas each model has, and how many gateways there are."""
        reports = await self._reports.read()
        gateways = sum(isinstance(report, GatewayState) for report in reports)
        replicas = Counter(report.model for report in reports if isinstance(report, ReplicaState))
        return {model: Standing(count, gateways) for model, count in replicas.items()}

    async def scaling(self) -> dict[str, Scaling]:
        """Return what was decided about numbers of replicas, by model and for the gateway."""
        reports = await self._reports.read()
        return next((report.standings for report in reports if isinstance(report, ScalingState)), {})

    def _handle(self, model: str) -> Any:
        if model not in self._handles:
            self._handles[model] = ray_serve.get_deployment_handle(ENGINE, app_name=model_app(self._name, model))
        return self._handles[model]


async def _awaited(answer: Any) -> Any:
    """Await what has only `__await__` or `__anext__`, as a coroutine that can be a task."""
    return await answer


@contextmanager
def _as_api_errors(model: str, request_id: str) -> Iterator[None]:
    try:
        yield
    except BackPressureError as error:
        retry = {"retry-after": str(max(1, math.ceil(error.retry_after_s or 1)))}
        message = f"{model!r} has as many requests waiting as it takes; try again in {retry['retry-after']} s"
        raise ApiError(429, message, code="overloaded", headers=retry) from None
    except (DeploymentUnavailableError, *LOST) as error:
        message = f"the replica of {model!r} that worked on this request was lost"
        raise ApiError(503, message, code="replica_lost", headers={"retry-after": "1"}) from error
    except RayError as error:
        logger.error("request %s: %s", request_id, error)
        message = f"{model!r} failed on this request; the gateway's log has the reason, under {request_id:.80}"
        raise ApiError(500, message, code="engine_failed") from error
