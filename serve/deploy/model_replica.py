"""The Ray Serve replica of a model: an engine, and how it is told to others."""

from __future__ import annotations

import asyncio
import importlib
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import serve as ray_serve

from cluster import garbage
from cluster.weights_cache import local
from serve.channel.server import Answer, Call, Server
from serve.deploy.names import log_with_serve
from serve.deploy.own_code import Unpacked
from serve.deploy.plan import ServedModel
from serve.deploy.reporting import Reporter
from serve.engines import table
from serve.engines.call_spans import CallSpans
from serve.engines.replica import Replica
from serve.tracing import begin
from serve.wire import Fetching, GenerateCall, Identity, InferCall, ReplicaState
from tracking import model_store

if TYPE_CHECKING:
    from serve.tracing.spans import Spans

DRAIN_S = 300.0
"""Until `serve up` has said how long."""


class ModelDeployment:
    """A replica of one model. Its user_config says how long it may take to leave; requests come by `serve.channel`."""

    async def __init__(self, name: str, model: ServedModel, secret: bytes, code: bytes | None = None) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        self._model, self._drain_s, begun = model, DRAIN_S, time.monotonic()
        self._replica_id = ray_serve.get_replica_context().replica_id.unique_id
        self._code = None if code is None else Unpacked(code)
        log_with_serve()
        await fetch(name, model, self._replica_id)
        self._replica: Any = await asyncio.to_thread(load_replica, model)
        await self._replica.start()
        self._spans = await asyncio.to_thread(begin.spans, "tandem.replica", name, self._replica_id)
        answer = traced(self._spans, model.name, partial(answered, self._replica))
        self._server = Server(self._replica_id, model.max_batch, secret, answer)
        await self._server.start(ray.util.get_node_ip_address())
        await asyncio.to_thread(garbage.settle)
        self._start_s = time.monotonic() - begun
        self._reporter = Reporter(name, self._replica_id, self._state)
        self._reporter.start()

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        self._drain_s = float(user_config["drain_s"])

    async def check_health(self) -> None:
        if not self._replica.healthy():
            raise RuntimeError("the engine has stopped")

    async def __del__(self) -> None:
        """Leave: Ray Serve calls and awaits this when the replica is scaled away or replaced.

        Gateways are told at once. What runs may end, for `drain_s`; what is left then goes on at other replicas.
        """
        self._server.refuse_more()
        self._reporter.tell()
        await self._server.leave(self._drain_s)
        self._reporter.stop()
        await self._replica.stop()
        if self._spans is not None:
            await asyncio.to_thread(self._spans.end)
        if self._code is not None:
            self._code.remove()

    def _state(self) -> ReplicaState:
        return ReplicaState(
            self._model.name,
            self._replica_id,
            self._model.version,
            self._replica.load(),
            self._replica.describe(),
            self._server.address,
            self._model.max_batch,
            self._server.leaving,
            self._model.build(),
            self._start_s,
        )


def traced(spans: Spans | None, model: str, answer: Answer) -> Answer:
    """Return what answers a call within a span; `answer` itself where nobody wants to see any."""
    return answer if spans is None else partial(CallSpans(spans, model).traced, answer)


async def answered(replica: Any, call: Call) -> AsyncGenerator[Any, None]:
    """Yield what a replica answers a call with: the messages of a text, or the one answer of anything else."""
    if isinstance(call, GenerateCall):
        async with aclosing(replica.generate(call)) as messages:
            async for message in messages:
                yield message
    elif isinstance(call, InferCall):
        yield await replica.infer(call)
    else:
        yield await replica.embed(call)


async def fetch(name: str, model: ServedModel, replica_id: str) -> None:
    """Have the model's folder on this node, with its weights: what lies in a store is fetched, once a node.

    Args:
        name: the endpoint, which is told meanwhile.

    Raises:
        UserError: it is missing or another one, or the disk has no room for it.
    """
    if await asyncio.to_thread(model_store.is_here, model.directory):
        return
    told = Fetching(model.name, model_store.shown(model.directory), ray.util.get_node_ip_address())
    reporter = Reporter(name, f"{replica_id}:fetching", lambda: told)
    reporter.start()
    try:
        await asyncio.to_thread(on_this_node, model)
    finally:
        reporter.stop()


def on_this_node(model: ServedModel) -> Path:
    """Return the model's folder with its weights, fetched where they lie in a store."""
    return local(model_store.here(model.directory))


def load_replica(model: ServedModel) -> Replica:
    """Load the model as the engine that the plan names does it."""
    engine = table.get(model.engine)
    setup = table.ReplicaSetup(
        directory=on_this_node(model),
        identity=Identity(model.version, model.run_id, model.build()),
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
