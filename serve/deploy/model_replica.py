"""The Ray Serve replica of a model: an engine, and how it is told to others."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

from ray import serve as ray_serve

from serve.deploy.names import log_with_serve
from serve.deploy.own_code import Unpacked
from serve.deploy.plan import ServedModel
from serve.deploy.state_actor import Reporter
from serve.engines import table
from serve.engines.replica import Replica
from serve.wire import (
    Chunk,
    EmbedCall,
    GenerateCall,
    Identity,
    InferCall,
    Inferred,
    Opened,
    Refused,
    ReplicaState,
    Vectors,
)


class ModelDeployment:
    """A replica of one model."""

    async def __init__(self, name: str, model: ServedModel, code: bytes | None = None) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        self._model = model
        self._replica_id = ray_serve.get_replica_context().replica_id.unique_id
        self._code = None if code is None else Unpacked(code)
        log_with_serve()
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
