"""A gateway over a real engine in the test's own process: only Ray Serve is left out."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path

import httpx

from serve.api import routes
from serve.api.body import ApiError
from serve.api.gateway import Gateway, ModelCard
from serve.engines import sampling_defaults
from serve.engines.replica import GenerativeReplica
from serve.engines.torch.torch_engine import TorchEngine
from serve.wire import (
    Chunk,
    EmbedCall,
    GenerateCall,
    Identity,
    InferCall,
    Inferred,
    Load,
    Opened,
    Refused,
    ReplicaState,
    Vectors,
)

CARD = ModelCard("tiny", "causal-lm", "3", True, 1700000000, {"run_id": "run-1", "evaluation": {"loss": 1.5}})
DIGITS = ModelCard("digits", "image-classification", "1", False, 1700000000, {})
Scenario = Callable[[httpx.AsyncClient, "InProcess"], Awaitable[None]]


class InProcess:
    """A Backend of one replica, in the gateway's own process."""

    def __init__(self, replica: GenerativeReplica) -> None:
        self.replica = replica
        self.failure: ApiError | None = None
        self.ready = True

    async def generate(
        self, model: str, call: GenerateCall, build: str | None = None
    ) -> AsyncGenerator[Opened | Chunk | Refused, None]:
        sent = 0
        async for message in self.replica.generate(call):
            if self.failure and sent == 3:
                raise self.failure
            yield message
            sent += 1

    async def infer(self, model: str, call: InferCall) -> Inferred | Refused:
        scores = [{"label": str(row.sum()), "score": 0.5} for row in call.inputs["image"]]
        return Inferred(Identity("1", None), scores)

    async def embed(self, model: str, call: EmbedCall) -> Vectors | Refused:
        return await self.replica.embed(call)

    async def states(self) -> tuple[list[ReplicaState], Counter[str]]:
        tiny = ReplicaState("tiny", "r1", "3", self.replica.load(), self.replica.describe())
        digits = ReplicaState("digits", "r2", "1", Load(0, 0, 0.0), {"inputs": [], "outputs": []})
        return [tiny, digits] if self.ready else [], Counter()


def run(directory: Path, scenario: Scenario, max_prompts: int = 3) -> None:
    """Run a scenario against a fresh gateway over the language model in `directory`, named `tiny`."""

    async def inside() -> None:
        loaded = TorchEngine.from_directory(directory, precision="fp32", max_batch=4, threads=1)
        replica = GenerativeReplica(loaded, Identity("3", "run-1"), sampling_defaults.read(directory))
        await replica.start()
        backend = InProcess(replica)
        gateway = Gateway(backend, max_body_bytes=20_000, max_prompts=max_prompts)
        gateway.catalog = {card.name: card for card in (CARD, DIGITS)}
        transport = httpx.ASGITransport(routes.build(lambda: gateway), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
            await scenario(client, backend)
        await replica.stop()

    asyncio.run(inside())
