"""What Ray Serve is asked to run: the application of the gateway and those of the models, from a spec."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ray import serve as ray_serve
from ray.serve.schema import LoggingConfig

from cluster.topology import Node
from serve.deploy import address, checks, ray_serve_internals, scaling, warm
from serve.deploy.access import Queue
from serve.deploy.environment import merged
from serve.deploy.gateway_replica import GatewayDeployment, GatewaySettings
from serve.deploy.model_replica import ModelDeployment
from serve.deploy.names import ENGINE, GATEWAY, model_app
from serve.deploy.own_code import OwnCode
from serve.deploy.plan import ServedModel
from serve.deploy.times import LEAVE_S
from serve.deploy.where import Address
from serve.front.limits import Limits
from serve.keys import place
from serve.spec import ServeSpec

HEALTH_PERIOD_S, HEALTH_TIMEOUT_S = 2.0, 2.5
"""Serve ends a replica after three checks in a row without an answer: within 12 s, and a busy one has 7 s."""


@dataclass(frozen=True)
class Endpoint:
    """What all applications of an endpoint are made with."""

    spec: ServeSpec
    environment: dict[str, Any]
    """The runtime environment that every replica needs."""
    secret: bytes
    """What gateways and replicas know each other by."""
    there: Mapping[str, int]
    """The replicas that there are already, by the application's name."""


def model(endpoint: Endpoint, served: ServedModel, code: OwnCode | None, nodes: Sequence[Node]) -> ray_serve.RunTarget:
    """Return the application of a model; `code` is the user's own, where its task or engine is."""
    spec = endpoint.spec
    settings, app = spec.models[served.name], model_app(spec.name, served.name)
    deployment = ray_serve.deployment(ModelDeployment).options(
        name=ENGINE,
        **ray_serve_internals.pinned(f"{served.digest()}-{_of_secret(endpoint.secret)}"),
        user_config={"drain_s": spec.drain_s},
        ray_actor_options={
            "num_cpus": settings.resources.cpus_per_replica,
            "num_gpus": settings.resources.gpus_per_replica,
            "runtime_env": {
                **warm.executable(served, settings),
                **merged(endpoint.environment, settings.runtime_env),
            },
        },
        logging_config=LoggingConfig(enable_access_log=False),  # the gateway keeps one
        max_surge_percent=100 if checks.fits_beside(settings, nodes) else 0,
        num_replicas=scaling.begin(settings, endpoint.there.get(app)),
        **_lifecycle(spec),
    )
    # Inside the deployment, not as a package of Ray's: cluster/shipping.py says why.
    carried = (code.packed,) if code is not None and served.code is not None else ()
    bound = deployment.bind(spec.name, served, endpoint.secret, *carried)
    return ray_serve.RunTarget(bound, name=app, route_prefix=None, external_scaler_enabled=settings.scales)


def gateway(
    endpoint: Endpoint, models: Sequence[ServedModel], at: Address, certificate: str | None
) -> ray_serve.RunTarget:
    """Return the application of the gateway, which listens `at`; `certificate` is the digest of its certificate."""
    spec, wanted = endpoint.spec, endpoint.spec.gateway
    settings = _settings(spec, at, certificate)
    deployment = ray_serve.deployment(GatewayDeployment).options(
        name=GATEWAY,
        **ray_serve_internals.pinned(f"{json.dumps(asdict(settings))}-{_of_secret(endpoint.secret)}"),
        max_ongoing_requests=10_000,
        user_config={
            "catalog": [_card(served, spec) for served in models],
            "operator": secrets.token_urlsafe(32),
            "scaling": scaling.plans(spec, {served.name: served.digest() for served in models}),
            "address": at._asdict(),
        },
        ray_actor_options={
            "num_cpus": wanted.cpus_per_replica,
            "runtime_env": merged(endpoint.environment, {"env_vars": ray_serve_internals.ONE_LOOP}),
            **address.placement(spec.http),
        },
        max_surge_percent=100,
        num_replicas=scaling.begin(wanted, endpoint.there.get(spec.name)),
        **_lifecycle(spec),
    )
    bound = deployment.bind(settings, endpoint.secret)
    return ray_serve.RunTarget(bound, name=spec.name, route_prefix=None, external_scaler_enabled=wanted.scales)


def _settings(spec: ServeSpec, at: Address, certificate: str | None) -> GatewaySettings:
    gateway = spec.gateway
    return GatewaySettings(
        spec.name,
        gateway.max_body_bytes,
        gateway.max_prompts,
        gateway.max_wait_s,
        tuple(spec.cors.origins),
        (spec.keys.store or place.default_url()) if spec.asks_for_keys else None,
        at.host,
        at.port,
        at.certificate,
        spec.http.tls.key if spec.http.tls else None,
        certificate,
        spec.drain_s,
        gateway.max_request_s,
        Limits(reader_s=spec.http.slow_reader_s, connections=gateway.max_connections),
    )


def _of_secret(secret: bytes) -> str:
    """Return what tells one secret from another, and nothing of it: with a new one all replicas are replaced."""
    return hashlib.sha256(secret).hexdigest()[:8]


def _lifecycle(spec: ServeSpec) -> dict[str, Any]:
    return {
        "graceful_shutdown_timeout_s": spec.drain_s + LEAVE_S,
        "graceful_shutdown_wait_loop_s": 0.5,
        "health_check_period_s": HEALTH_PERIOD_S,
        "health_check_timeout_s": HEALTH_TIMEOUT_S,
        "max_constructor_retry_count": 2,
    }


def _card(served: ServedModel, spec: ServeSpec) -> dict[str, Any]:
    fields, settings = asdict(served), spec.models[served.name]
    card = {key: fields[key] for key in ("name", "task", "version", "generates", "created", "details")}
    share = settings.max_queued_per_key or max(1, settings.max_queued // 2)
    per_key = share if spec.asks_for_keys else settings.max_queued  # without keys all are one
    queue = asdict(Queue(settings.max_batch, settings.max_queued, per_key))
    return {**card, "queue": queue, "sleeps": settings.bounds.min == 0}
