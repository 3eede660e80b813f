"""The Ray Serve replica of the gateway: an HTTP server of its own, with the routes over the models of the catalog.

Serve places, checks, replaces and ends it; requests reach it by the socket alone, and gateways of one node share the
port. It listens when it has its first catalog, and before Serve ends the one that it replaces.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray import serve as ray_serve

from cluster import garbage
from cluster.errors import UserError
from serve.api import routes
from serve.api.gateway import Gateway, ModelCard
from serve.deploy import address, ray_serve_internals
from serve.deploy.access import Access, queues_of
from serve.deploy.backend import RayBackend
from serve.deploy.names import log_with_serve
from serve.deploy.reporting import Reader, Reporter
from serve.deploy.where import ANY
from serve.front import tls
from serve.front.access_log import AccessLog
from serve.front.app import Front
from serve.front.exchange import Exchange
from serve.front.limits import Limits
from serve.front.server import Server
from serve.metrics import watch
from serve.metrics.metrics import Metrics
from serve.metrics.record import Record
from serve.metrics.series import Sample
from serve.scaling.decisions import ScalingState, scaling_samples
from serve.tracing import begin
from serve.wire import GatewayState

logger = logging.getLogger(__name__)
CUT_BEFORE_S = 2.0
"""What a leaving gateway has not answered is cut so long before Serve would kill it, so that its last counts are
written."""


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
    host: str = "127.0.0.1"
    port: int = 0
    certificate: str | None = None
    key: str | None = None
    certificate_digest: str | None = None
    """A renewed certificate is another one, though its path is the same."""
    drain_s: float = 30.0
    max_request_s: float | None = None
    limits: Limits = field(default_factory=Limits)

    def secure(self) -> ssl.SSLContext | None:
        """Return what TLS needs. Raises UserError where its files cannot be used."""
        return tls.context(self.certificate, self.key) if self.certificate and self.key else None


class GatewayDeployment:
    """A replica of the gateway. Its user_config is the catalog, so models come and go without a restart."""

    _server: Server | None = None
    _scales = False

    async def __init__(self, settings: GatewaySettings, secret: bytes) -> None:  # type: ignore[misc]  # see above
        log_with_serve()
        self._settings = settings
        self._backend = RayBackend(settings.name, secret, settings.max_wait_s)
        self._backend.start()
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
            Metrics(Record(replica_id), Reader(settings.name).read, _decided),
        )
        self.gateway.host = None if settings.host in ANY else settings.host
        self.gateway.scaling = self._backend.scaling
        self._backend.went_on = self.gateway.metrics.record.resumed
        self._reporter = Reporter(settings.name, replica_id, self._state)
        self._access.start(self._backend.standing, self._reporter.soon)
        folder = Path(ray_serve_internals.logs_directory())
        self._log = AccessLog(folder / f"access_{settings.name}_{replica_id}.jsonl")
        self._spans = await asyncio.to_thread(begin.spans, "tandem.gateway", settings.name, replica_id)
        garbage.settle()

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        catalog, self._scales = user_config["catalog"], bool(user_config["scaling"])
        queues = queues_of(catalog)
        self._access.configure(queues, user_config["operator"])
        self.gateway.sleepers = frozenset(card["name"] for card in catalog if card["sleeps"])
        shown = [{key: value for key, value in card.items() if key not in ("queue", "sleeps")} for card in catalog]
        self.gateway.catalog = {card["name"]: ModelCard(**card) for card in shown}
        if self._server is None:
            self._server = await self._listen()
            self._log.start()
            self._reporter.start()

    async def check_health(self) -> None:
        """Say that this replica must be replaced: raise where it does not listen."""
        if self._server is not None and not self._server.is_listening:
            raise RuntimeError("the gateway does not listen any more")

    async def __del__(self) -> None:
        if self._server is None:
            return
        await self._server.leave(max(1.0, self._settings.drain_s - CUT_BEFORE_S))
        self._reporter.stop()
        await self._access.stop()
        await self._backend.stop()
        await self._log.stop()
        if self._spans is not None:
            await asyncio.to_thread(self._spans.end)

    async def _listen(self) -> Server:
        settings = self._settings
        routed = routes.build(lambda: self.gateway)
        app = Front(routed, self._ended, settings.max_request_s, lambda: settings.cors_origins, self._spans)
        owner = f"{ray.get_runtime_context().gcs_address} {settings.name}"
        server = Server(app, settings.host, settings.port, settings.limits, settings.secure(), self._ended, owner)
        try:
            await server.start()
        except OSError as error:
            raise UserError(address.cannot_listen(settings.host, settings.port, error)) from None
        logger.info("listens on %s:%d; access log: %s", settings.host, settings.port, self._log.path)
        return server

    def _ended(self, ended: Exchange) -> None:
        """Log and count a request."""
        watch.count_refused(self.gateway.metrics.record, ended)
        self._log.add(ended)

    def _state(self) -> GatewayState:
        listens = self._server is not None and self._server.is_listening
        host = ray.util.get_node_ip_address() if self._settings.host in ANY else self._settings.host
        return GatewayState(
            dict(self._backend.pending + Counter(self._access.waiting())),
            self._access.work(),
            address=f"{host}:{self._settings.port}" if listens else "",
            open_requests=self._server.open_requests if self._server else 0,
            metrics=self.gateway.metrics.told(self.gateway.catalog),
            scales=self._scales,
        )


def _decided(reports: Iterable[Any]) -> Iterator[Sample]:
    """Give what scaling has decided, as metrics."""
    for report in reports:
        if isinstance(report, ScalingState):
            yield from (Sample(*each) for each in scaling_samples(report.standings))
