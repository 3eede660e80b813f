"""The two kinds of Ray Serve replica: a model's, and the gateway's with its way to the models."""

from __future__ import annotations

import asyncio
import importlib
import logging
import math
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve as ray_serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

from serve.api import routes
from serve.api.body import ApiError
from serve.api.gateway import Gateway, ModelCard
from serve.deploy import readiness
from serve.deploy.access import Access, Standing, queues_of
from serve.deploy.own_code import Unpacked
from serve.deploy.plan import ServedModel
from serve.deploy.ray_serve_internals import own_deployment
from serve.deploy.state_actor import Reader, Reporter
from serve.engines import table
from serve.engines.replica import Replica
from serve.wire import (
    Chunk,
    EmbedCall,
    GatewayState,
    GenerateCall,
    Identity,
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
ENGINE = "engine"
GATEWAY = "gateway"


def model_app(name: str, model: str) -> str:
    """Return the name of the Serve application of one model."""
    return f"{name}.{model}"


class ModelDeployment:
    """A replica of one model."""

    async def __init__(self, name: str, model: ServedModel, code: bytes | None = None) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        self._model = model
        self._replica_id = ray_serve.get_replica_context().replica_id.unique_id
        self._code = None if code is None else Unpacked(code)
        _log_with_serve()
        self._replica: Any = await asyncio.to_thread(load_replica, model)
        await self._replica.start()
        self._reporter = Reporter(name, self._replica_id, self._state)
        self._reporter.start()

    async def generate(self, call: GenerateCall) -> AsyncGenerator[Opened | Chunk | Refused, None]:
        async with aclosing(self._replica.generate(call)) as messages:
            async for message in messages:
                yield message

    async def infer(self, call: InferCall) -> Inferred | Refused:
        answer: Inferred | Refused = await self._replica.infer(call)
        return answer

    async def embed(self, call: EmbedCall) -> Vectors | Refused:
        answer: Vectors | Refused = await self._replica.embed(call)
        return answer

    async def check_health(self) -> None:
        if not self._replica.healthy():
            raise RuntimeError("the engine has stopped")

    async def __del__(self) -> None:
        """Leave: Ray Serve calls and awaits this when the replica's requests have ended."""
        self._reporter.stop()
        await self._replica.stop()
        if self._code is not None:
            self._code.remove()

    def _state(self) -> ReplicaState:
        described = self._replica.describe()
        return ReplicaState(self._model.name, self._replica_id, self._model.version, self._replica.load(), described)


def _log_with_serve() -> None:
    """Send what our modules log to the replica's log: Ray Serve keeps that for its own logger, `ray.serve`, alone."""
    ours = logging.getLogger("serve")
    ours.handlers = list(logging.getLogger("ray.serve").handlers)
    ours.setLevel(logging.INFO)


def load_replica(model: ServedModel) -> Replica:
    """Load the model as the engine that the plan names does it."""
    engine = table.get(model.engine)
    setup = table.ReplicaSetup(
        directory=Path(model.directory),
        identity=Identity(model.version, model.run_id),
        task=model.task,
        options=engine.options.model_validate(model.options),
        precision=model.precision,
        max_context=model.max_context,
        max_batch=model.max_batch,
        threads=model.threads,
    )
    module, _, function = engine.load.partition(":")
    loaded: Replica = getattr(importlib.import_module(module), function)(setup)
    return loaded


@dataclass(frozen=True)
class GatewaySettings:
    """What a gateway's replicas are made with; a change of it replaces them."""

    name: str
    max_body_bytes: int
    max_prompts: int
    max_wait_s: float
    cors_origins: tuple[str, ...]
    store_url: str | None
    """Where keys are; None: nobody is asked for one."""


class GatewayDeployment:
    """A replica of the gateway. Its user_config is the catalog, so models come and go without a restart."""

    async def __init__(self, settings: GatewaySettings) -> None:  # type: ignore[misc]  # see above
        _log_with_serve()
        self._backend = RayBackend(settings.name)
        replica_id = ray_serve.get_replica_context().replica_id.unique_id
        self._access = await asyncio.to_thread(
            Access, settings.name, replica_id, settings.store_url, settings.max_wait_s
        )
        self.gateway = Gateway(
            self._backend,
            settings.max_body_bytes,
            settings.max_prompts,
            settings.cors_origins,
            self._access.admission,
            self._access.doorkeeper,
        )
        self._access.start(self._backend.standing)
        self._reporter = Reporter(settings.name, replica_id, self._state)
        self._reporter.start()

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        catalog = user_config["catalog"]
        self._access.configure(queues_of(catalog), user_config["operator"])
        shown = [{key: value for key, value in card.items() if key != "queue"} for card in catalog]
        self.gateway.catalog = {card["name"]: ModelCard(**card) for card in shown}

    async def __del__(self) -> None:
        self._reporter.stop()
        await self._access.stop()

    def _state(self) -> GatewayState:
        return GatewayState(dict(self._backend.pending + Counter(self._access.waiting())))


def asgi_app() -> FastAPI:
    """Build the routes inside a gateway replica; they find its Gateway when a request comes."""
    return routes.build(lambda: own_deployment().gateway)


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
