"""The Ray Serve replica of the gateway: the routes over the models that the catalog names."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from ray import serve as ray_serve

from serve.api import routes
from serve.api.gateway import Gateway, ModelCard
from serve.deploy.access import Access, queues_of
from serve.deploy.backend import RayBackend
from serve.deploy.names import log_with_serve
from serve.deploy.ray_serve_internals import own_deployment
from serve.deploy.state_actor import Reporter
from serve.wire import GatewayState


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

    _scales = False

    async def __init__(self, settings: GatewaySettings) -> None:  # type: ignore[misc]  # see above
        log_with_serve()
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
        self.gateway.scaling = self._backend.scaling
        self._reporter = Reporter(settings.name, replica_id, self._state)
        self._access.start(self._backend.standing, self._reporter.soon)
        self._reporter.start()

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        catalog, self._scales = user_config["catalog"], bool(user_config["scaling"])
        self._access.configure(queues_of(catalog), user_config["operator"])
        self.gateway.sleepers = frozenset(card["name"] for card in catalog if card["sleeps"])
        shown = [{key: value for key, value in card.items() if key not in ("queue", "sleeps")} for card in catalog]
        self.gateway.catalog = {card["name"]: ModelCard(**card) for card in shown}

    async def __del__(self) -> None:
        self._reporter.stop()
        await self._access.stop()

    def _state(self) -> GatewayState:
        pending = dict(self._backend.pending + Counter(self._access.waiting()))
        return GatewayState(pending, self._access.work(), scales=self._scales)


def asgi_app() -> FastAPI:
    """Build the routes inside a gateway replica; they find its Gateway when a request comes."""
    return routes.build(lambda: own_deployment().gateway)
