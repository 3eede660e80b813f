"""A gateway over real models that answer at once, in the test's own process: only Ray Serve is left out."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx

from serve.api import routes
from serve.api.gateway import Gateway, ModelCard
from serve.engines.predictive import PredictiveEngine
from serve.engines.replica import PredictiveReplica
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
from tests.support import tiny_models

TASKS = {"shapes": "image-classification", "opinions": "text-classification"}
CHAT = ModelCard("chat", "causal-lm", "1", True, 1700000000, {})
MOST = 200_000
"""Bytes of the largest body."""


class Predicting:
    """A Backend of one replica a model; the text model `chat` is only listed."""

    def __init__(self, replicas: dict[str, PredictiveReplica]) -> None:
        self.replicas = replicas
        self.failure: Exception | None = None

    async def generate(
        self, model: str, call: GenerateCall, build: str | None = None
    ) -> AsyncGenerator[Opened | Chunk | Refused, None]:
        for text in ("a", "b"):
            yield Chunk(text, 1)

    async def infer(self, model: str, call: InferCall) -> Inferred | Refused:
        if self.failure is not None:
            raise self.failure
        return await self.replicas[model].infer(call)

    async def embed(self, model: str, call: EmbedCall) -> Vectors | Refused:
        return await self.replicas[model].embed(call)

    async def states(self) -> tuple[list[ReplicaState], Counter[str]]:
        ready = [
            ReplicaState(name, name, "1", replica.load(), replica.describe()) for name, replica in self.replicas.items()
        ]
        return [*ready, ReplicaState("chat", "chat", "1", Load(0, 0, 0.0), {"inputs": [], "outputs": []})], Counter()


Scenario = Callable[[httpx.AsyncClient, Predicting], Awaitable[None]]


def models(folder: Path) -> dict[str, tuple[Any, Any]]:
    """Return tasks with their models: `shapes`, images of 8x8 pixels, and `opinions`, texts."""
    from jobs import tasks

    images = tasks.get("image-classification").load(tiny_models.image_classifier(folder))
    texts = tasks.get("text-classification")({"tokenizer": {"train": "word"}})
    examples = [{"text": text, "label": label} for text, label in (("a good film", "good"), ("a bad film", "bad"))] * 2
    texts.fit(texts.observe(examples))
    built = texts.build("ngram", {"hidden_size": 8, "buckets": 16}).eval()
    return {"shapes": (images, images.load_model(folder)), "opinions": (texts, built)}


def gateway(replicas: dict[str, PredictiveReplica], cors_origins: Sequence[str] = ()) -> tuple[Gateway, Predicting]:
    """Return a gateway over the replicas, and its backend."""
    backend = Predicting(replicas)
    front = Gateway(backend, MOST, 3, cors_origins)
    cards = [ModelCard(name, TASKS.get(name, "own"), "1", False, 1700000000, {}) for name in replicas]
    front.catalog = {card.name: card for card in [*cards, CHAT]}
    return front, backend


def run(loaded: dict[str, tuple[Any, Any]], scenario: Scenario, cors_origins: Sequence[str] = ()) -> None:
    """Run a scenario against a fresh gateway over the models."""

    async def inside() -> None:
        replicas = {name: replica(task, model) for name, (task, model) in loaded.items()}
        for each in replicas.values():
            await each.start()
        front, backend = gateway(replicas, cors_origins)
        transport = httpx.ASGITransport(routes.build(lambda: front), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
            await scenario(client, backend)
        for each in replicas.values():
            await each.stop()

    asyncio.run(inside())


def replica(task: Any, model: Any) -> PredictiveReplica:
    """Return a replica of a task's model, as the engine `task` loads it."""
    return PredictiveReplica(PredictiveEngine(task, model), task.inputs(), Identity("1", None), task.outputs())
