"""Gateways over real tiny models, listening on free ports of this machine from a thread: what a browser can open."""

from __future__ import annotations

import asyncio
import io
import socket
import threading
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from PIL import Image

from serve.api import routes
from serve.api.admission import Admission
from serve.api.doorkeeper import KeyDoorkeeper
from serve.api.gateway import Gateway, ModelCard
from serve.api.own_rates import OwnRates
from serve.engines import sampling_defaults
from serve.engines.replica import GenerativeReplica, PredictiveReplica
from serve.engines.torch.torch_engine import TorchEngine
from serve.fair.turns import Turns
from serve.keys.directory import Directory
from serve.keys.limits import Limits
from serve.keys.meter import Meter
from serve.keys.store import Store
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
from tests.support import predictive, tiny_models

CREATED = 1700000000
HOSTILE = "<img src=x onerror='document.title = 1'><script>document.title = 2</script>"
"""A label that does harm where it is taken for HTML."""


class Flat:
    """A task with a table's columns: its answer tells what came."""

    def inputs(self) -> list[dict[str, Any]]:
        numbers = [
            {"name": name, "datatype": kind, "shape": [-1]} for name, kind in (("area", "FP32"), ("id", "INT64"))
        ]
        flag = {"name": "new", "datatype": "BOOL", "shape": [-1]}
        return [*numbers, flag, {"name": "rooms", "datatype": "INT32", "shape": [-1, 3]}]

    def outputs(self) -> list[dict[str, Any]]:
        return []

    def predict(self, model: Any, instances: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [
            {
                "price": float(each["area"]) * (2 if each["new"] else 1),
                "id": int(each["id"]),
                "rooms": int(each["rooms"].sum()),
                "kinds": {HOSTILE: 0.75, "flat": 0.25},
            }
            for each in instances
        ]


class Blurred(Flat):
    """A task whose input is no form: a tensor of any length."""

    def inputs(self) -> list[dict[str, Any]]:
        return [{"name": "series", "datatype": "FP32", "shape": [-1, -1, 2]}]

    def predict(self, model: Any, instances: list[Any]) -> list[dict[str, Any]]:
        return [{"sum": float(each.sum()), "shape": list(each.shape)} for each in instances]


class Basket(Flat):
    """Takes lists of any length, of which one may be left out."""

    name = "basket"

    def inputs(self) -> list[dict[str, Any]]:
        weights = {"name": "weights", "datatype": "FP32", "shape": [-1, -1], "parameters": {"optional": True}}
        return [{"name": "bought", "datatype": "BYTES", "shape": [-1, -1]}, weights]

    def predict(self, model: Any, instances: list[Any]) -> list[dict[str, Any]]:
        return [
            {
                "bought": "\n".join(each["bought"]),
                "weights": " ".join(f"{weight:g}" for weight in each.get("weights", [])),
            }
            for each in instances
        ]


class Painter(Flat):
    """Answers with a picture."""

    name = "painter"

    def inputs(self) -> list[dict[str, Any]]:
        return [{"name": "seed", "datatype": "INT64", "shape": [-1]}]

    def predict(self, model: Any, instances: list[Any]) -> list[dict[str, Any]]:
        drawn = io.BytesIO()
        Image.new("L", (4, 4), 200).save(drawn, "PNG")
        return [{"image": drawn.getvalue()} for _ in instances]


class Models:
    """A Backend of one replica a model, in the gateway's process."""

    def __init__(self) -> None:
        self.texts: dict[str, GenerativeReplica] = {}
        self.others: dict[str, PredictiveReplica] = {}

    def generate(
        self, model: str, call: GenerateCall, build: str | None = None
    ) -> AsyncGenerator[Opened | Chunk | Refused, None]:
        return self.texts[model].generate(call)

    async def infer(self, model: str, call: InferCall) -> Inferred | Refused:
        return await self.others[model].infer(call)

    async def embed(self, model: str, call: EmbedCall) -> Vectors | Refused:
        return await self.texts[model].embed(call)

    async def states(self) -> tuple[list[ReplicaState], Counter[str]]:
        every = {**self.texts, **self.others}
        return [ReplicaState(name, name, "1", one.load(), one.describe()) for name, one in every.items()], Counter()


class Site:
    """Two endpoints over the same models: one for anyone, and one that asks for keys."""

    def __init__(self, folder: Path) -> None:
        self.models = Models()
        self.store = Store(f"sqlite:///{folder / 'keys.db'}")
        self._folder = folder
        self._loop = asyncio.new_event_loop()
        self._sockets = [_listening(), _listening()]
        self.open, self.keyed = (f"http://127.0.0.1:{one.getsockname()[1]}/" for one in self._sockets)

    def key(self, name: str, **limits: Any) -> str:
        """Return a new key."""
        return self.store.create(name, Limits(**limits)).text

    def running(self) -> int:
        """Return how many texts the engines work on."""
        return sum(one.load().running for one in self.models.texts.values())

    async def _load(self) -> None:
        chat = tiny_models.language_model(self._folder / "chat", context=4096)
        plain = tiny_models.language_model(self._folder / "plain", fast=tiny_models.byte_tokenizer())  # no template
        for name, place in (("tiny", chat), ("plain", plain)):
            engine = TorchEngine.from_directory(place, precision="fp32", max_batch=4, threads=1)
            self.models.texts[name] = GenerativeReplica(engine, Identity("1", "run-1"), sampling_defaults.read(place))
        tasks = {**predictive.models(self._folder / "shapes"), "flats": (Flat(), None), "series": (Blurred(), None)}
        tasks |= {"basket": (Basket(), None), "painter": (Painter(), None)}
        self.models.others = {name: predictive.replica(task, model) for name, (task, model) in tasks.items()}
        for one in self._replicas():
            await one.start()

    def _replicas(self) -> list[Any]:
        return [*self.models.texts.values(), *self.models.others.values()]

    async def run(self, ready: threading.Event) -> None:
        """Serve until `end`."""
        await self._load()
        meter = Meter(self.store, self._folder / "usage")
        turns = Turns(4, 100, 100)
        keyed = {
            "admission": Admission(OwnRates(), meter, lambda model: turns, 5.0),
            "doorkeeper": KeyDoorkeeper(Directory(self.store.find)),
        }
        gateways = [Gateway(self.models, 200_000, 3), Gateway(self.models, 200_000, 3, **keyed)]  # type: ignore[arg-type]
        for gateway in gateways:
            gateway.catalog = {card.name: card for card in self._cards()}
        self.servers = [_server(gateway) for gateway in gateways]
        serving = [server.serve([one]) for server, one in zip(self.servers, self._sockets, strict=True)]
        self._loop.call_soon(ready.set)
        await asyncio.gather(*serving)
        await meter.stop()
        for one in self._replicas():
            await one.stop()

    def _cards(self) -> list[ModelCard]:
        texts = [ModelCard(name, "causal-lm", "1", True, CREATED, {"run_id": "run-1"}) for name in self.models.texts]
        others = [
            ModelCard(name, predictive.TASKS.get(name, "own"), "1", False, CREATED, {}) for name in self.models.others
        ]
        return texts + others


@contextmanager
def served(folder: Path) -> Iterator[Site]:
    """Serve from a thread; everything ends with the block."""
    site, ready = Site(folder), threading.Event()
    thread = threading.Thread(target=site._loop.run_until_complete, args=(site.run(ready),), daemon=True)
    thread.start()
    assert ready.wait(60)
    try:
        yield site
    finally:
        for server in site.servers:
            server.should_exit = True
        thread.join(30)
    assert not thread.is_alive()


def _server(gateway: Gateway) -> uvicorn.Server:
    app = routes.build(lambda: gateway)
    return uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=2))


def _listening() -> socket.socket:
    opened = socket.socket()
    opened.bind(("127.0.0.1", 0))
    opened.listen()
    return opened
