"""What a gateway replica needs to admit requests: keys, counts, rates, and the turns of each model."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cluster.home import home
from serve.api.admission import Admission
from serve.api.body import model_not_found
from serve.api.callers import Doorkeeper
from serve.api.doorkeeper import KeyDoorkeeper
from serve.api.own_rates import OwnRates, Rates
from serve.deploy.rates import SharedRates
from serve.fair.turns import Turns
from serve.keys.directory import Directory
from serve.keys.meter import Meter
from serve.keys.store import Store
from serve.scaling.work import ModelWork
from serve.wire import Work

logger = logging.getLogger(__name__)

WINDOW = 1.25
"""Requests on their way for each slot of a replica: one is at hand when a slot frees."""
LOOK_S = 0.5


@dataclass(frozen=True)
class Queue:
    """How requests wait for one model at one gateway."""

    slots: int
    """Sequences that one replica works on at the same time."""
    most: int
    most_per_key: int


@dataclass(frozen=True)
class Standing:
    """What there is of one model, and how many gateways share it."""

    replicas: int
    gateways: int


class Access:
    """The admission of one gateway replica. Without a store nobody is asked for a key."""

    def __init__(self, name: str, gateway: str, store_url: str | None, patience_s: float) -> None:
        self._queues: Mapping[str, Queue] = {}
        self._turns: dict[str, Turns] = {}
        self._store = Store(store_url) if store_url else None
        self._meter = Meter(self._store, home() / "serve" / "usage") if self._store else None
        self._shared = SharedRates(name, gateway) if self._store else None
        self._keys = KeyDoorkeeper(Directory(self._store.find)) if self._store else None
        rates: Rates = self._shared or OwnRates()
        self.admission = Admission(rates, self._meter, self._turns_of, patience_s, self._arriving)
        self._work: dict[str, ModelWork] = {}
        self._standing: Mapping[str, Standing] = {}
        self._soon: Callable[[], None] = lambda: None
        self._task: asyncio.Task[None] | None = None

    @property
    def doorkeeper(self) -> Doorkeeper | None:
        """Who asks for keys."""
        return self._keys

    def start(
        self, standing: Callable[[], Awaitable[Mapping[str, Standing]]], soon: Callable[[], None] = lambda: None
    ) -> None:
        """Begin to count, and to follow how many replicas there are.

        `soon` is called when a request comes for a model that has none: what this gateway reports will wake it.
        """
        self._soon = soon
        if self._meter and self._shared:
            self._meter.start()
            self._shared.start()
        self._task = asyncio.get_running_loop().create_task(self._follow(standing))

    async def stop(self) -> None:
        """Write what was counted."""
        if self._task:
            self._task.cancel()
        if self._meter and self._shared and self._store:
            self._shared.stop()
            await self._meter.stop()
            self._store.close()

    def configure(self, queues: Mapping[str, Queue], operator: str | None) -> None:
        """Take the queues of the models that are served now, and the secret of the cluster's own commands.

        Requests of a model that is gone end with its turns and its work, which they have; a name that comes back
        begins with new ones.
        """
        self._queues = queues
        for gone in (set(self._turns) | set(self._work)) - set(queues):
            self._turns.pop(gone, None)
            self._work.pop(gone, None)
        for name, turns in self._turns.items():
            turns.bound(queues[name].most, queues[name].most_per_key)
        if self._keys:
            self._keys.operator = operator

    def waiting(self) -> dict[str, int]:
        """Return how many requests wait for each model."""
        return {name: turns.waiting for name, turns in self._turns.items()}

    def work(self) -> dict[str, Work]:
        """Return what there is to do for each model, as scaling counts it."""
        return {name: work.told() for name, work in self._work.items() if name in self._queues}

    def _arriving(self, model: str) -> ModelWork:
        """Return the work of a model that a request comes for."""
        if model not in self._standing:
            self._soon()
        return self._work.setdefault(model, ModelWork())

    def _turns_of(self, model: str) -> Turns:
        if model not in self._turns:
            queue = self._queues.get(model)
            if queue is None:  # `serve up` took the model out since the request was read
                raise model_not_found(model, list(self._queues))
            alone = Standing(1, 1)
            self._turns[model] = Turns(
                window(queue, alone), queue.most, queue.most_per_key, slots=slots_of(queue, alone)
            )
        return self._turns[model]

    async def _follow(self, standing: Callable[[], Awaitable[Mapping[str, Standing]]]) -> None:
        while True:
            try:
                found = self._standing = await standing()
            except Exception as error:  # a cluster in trouble: the windows stay
                logger.warning("how many replicas there are is not known: %s", type(error).__name__)
                found = {}
            for model, turns in self._turns.items():
                if model in found and model in self._queues:
                    queue = self._queues[model]
                    turns.widen(window(queue, found[model]), slots_of(queue, found[model]))
            await asyncio.sleep(LOOK_S)


def window(queue: Queue, standing: Standing) -> int:
    """Return how many requests of a model one gateway may have on their way. Pure.

    Without a replica as many as for one: they are what wakes it.
    """
    return max(1, math.ceil(WINDOW * slots_of(queue, standing)))


def slots_of(queue: Queue, standing: Standing) -> float:
    """Return how many requests of a model its replicas work on at once, as far as they are one gateway's."""
    return queue.slots * max(1, standing.replicas) / max(1, standing.gateways)


def queues_of(catalog: list[dict[str, Any]]) -> dict[str, Queue]:
    """Return each model's queue from what `serve up` wrote into the gateway's configuration."""
    return {card["name"]: Queue(**card["queue"]) for card in catalog}
