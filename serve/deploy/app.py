"""ServeSpec → Ray Serve applications: the only wiring. It runs in the cluster, as the entry point of a Ray job:

    python -m serve.deploy.app up '{"models": {…}}'
    python -m serve.deploy.app up '{"models": {…}}' FOLDER      with the user's own code as working directory
    python -m serve.deploy.app down tandem

One application is the gateway, named like the spec, and one each model, `<name>.<model>`: a model is added, replaced
or removed without touching the others. All of it is detached and outlives the job. Lines that start with `@tandem `
are for `serve.endpoints`, which follows the log: progress, and at the end the outcome or the user's mistake, as JSON.
Code of the user's own comes from FOLDER on the user's machine, when a model's task or engine asks for it.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import ray
from ray import serve as ray_serve
from ray.serve.schema import LoggingConfig

from cluster import connect, topology
from cluster.errors import UserError
from cluster.topology import Node
from serve import served
from serve.deploy import (
    address,
    checks,
    controller,
    plan,
    rates,
    ray_serve_internals,
    scaling,
    state_actor,
    waiting,
    warm,
)
from serve.deploy.access import Queue
from serve.deploy.gateway_replica import GatewayDeployment, GatewaySettings
from serve.deploy.model_replica import ModelDeployment
from serve.deploy.names import ENGINE, GATEWAY, model_app
from serve.deploy.own_code import CodeWanted, OwnCode
from serve.deploy.plan import ServedModel
from serve.deploy.turns import turn
from serve.deploy.where import Address
from serve.endpoints import MARK
from serve.front import tls
from serve.front.limits import Limits
from serve.keys import place
from serve.spec import GatewaySpec, ServeSpec

REPLICA_ENV = ("MLFLOW_TRACKING_URI", "TANDEM_HOME", "HF_HOME", "HF_HUB_OFFLINE")
DOWN_TIMEOUT_S = 60.0
"""How long `down` waits for an `up` that is at work."""
LISTENING_S = 30.0
"""A gateway that runs listens, and tells so within a second."""
LEAVE_S = 5.0
"""What a replica has beyond `drain_s` to give its requests back and to stop its engine, before Serve ends it."""
HEALTH_PERIOD_S, HEALTH_TIMEOUT_S = 2.0, 2.5
"""Serve ends a replica after three checks in a row without an answer: within 12 s, and a busy one has 7 s."""


def up(spec: ServeSpec, code: OwnCode | None = None) -> dict[str, Any]:
    """Deploy the spec, or update what runs to it, and wait until every model has its replicas.

    Returns the endpoint and the models. Raises UserError or TrackingError for what the user can put right, CodeWanted
    when `code` is needed.
    """
    models = plan.resolve(spec, code)
    for model in (model for model in models if "warning" in model.details):
        _tell(progress=f"warning: models.{model.name}: {model.details['warning']}")
    nodes = topology.nodes()
    checks.refuse_what_never_fits(spec, nodes)
    for sentence in checks.emulated(spec):
        _tell(progress=sentence)
    running = _running_address(spec.name)
    at = address.choose(spec.http, running)
    certificate = tls.check(spec.http.tls.certificate, spec.http.tls.key) if spec.http.tls else None
    address.start_serve()
    environment = _replica_environment()
    secret = state_actor.start(spec.name, environment, _say)
    if spec.asks_for_keys:
        if not checks.keys(spec, nodes):
            _tell(progress="warning: there are no keys yet, so that nobody can call: `tandem serve keys make NAME`")
        rates.start(spec.name, environment, _say)
    there = scaling.there()
    for sentence in checks.drained_first(spec, nodes, there):
        _tell(progress=sentence)
    targets = [_model_target(spec, model, environment, secret, code, nodes, there) for model in models]
    wanted = {target.name for target in targets} | {spec.name}
    targets.append(_gateway_target(spec, models, environment, secret, there, at, certificate))
    ray_serve.run_many(targets, wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    try:
        waiting.until_running(sorted(wanted), spec.start_timeout_s, _tell)
    finally:  # what does run scales also where a model fails
        state_actor.deployed(spec.name)
    waiting.until_listening(spec.name, at.port, at.certificate, LISTENING_S)
    for name in _own_apps(spec.name) - wanted:
        _tell(progress=f"{name}: removed, the spec does not name it any more")
        ray_serve_internals.delete_soon(name)
    listed = {model.name: {"version": model.version, "generates": model.generates} for model in models}
    outcome = {"endpoint": at.url(ray.util.get_node_ip_address()), "name": spec.name, "models": listed}
    told = {"keys": spec.asks_for_keys, "certificate": at.certificate, "deployed_at": time.time()}
    return {**outcome, **told}


def down(name: str) -> dict[str, Any]:
    """Remove the applications of `name`, and Serve itself when nothing else runs on it. Returns what was stopped."""
    if not address.is_running():
        return {"stopped": [], "serve": False}
    own = _own_apps(name)
    others = set(ray_serve.status().applications) - own
    state_actor.stop(name)
    rates.stop(name)
    if others:
        for app in sorted(own):
            ray_serve.delete(app)
    else:
        ray_serve.shutdown()
    return {"stopped": sorted(own), "serve": not others}


def main(arguments: list[str]) -> int:
    """Run one verb and print its outcome; errors a user can act on become part of it, not a traceback."""
    verb, argument, *origin = arguments
    connect.init_ray()
    try:
        outcome = _in_turn(verb, argument, OwnCode.here(*origin) if origin else None)
    except CodeWanted as wanted:
        outcome = {"code_wanted": str(wanted)}
    except UserError as error:
        _tell(error=str(error))
        return 1
    _tell(outcome=outcome)
    return 0


def _in_turn(verb: str, argument: str, code: OwnCode | None) -> dict[str, Any]:
    spec = ServeSpec.model_validate_json(argument) if verb == "up" else None

    with turn(spec.start_timeout_s if spec else DOWN_TIMEOUT_S, _say, _owner()):
        controller.ensure_answers(_say)
        with controller.watched(_give_up):
            return up(spec, code) if spec else down(argument)


def _give_up(sentence: str) -> None:
    """End this job from any thread; the main one waits for an answer that does not come."""
    _tell(error=sentence)
    os._exit(1)


def _owner() -> str:
    """Say who deploys, for whoever waits: the job, whose id `tandem jobs` knows."""
    return f"job {os.environ.get(served.JOB) or ray.get_runtime_context().get_job_id()}"


def _say(text: str) -> None:
    _tell(progress=text)


def _tell(**message: Any) -> None:
    print(MARK + json.dumps(message), flush=True)


# -- applications ----------------------------------------------------------------------------------------------------


def _model_target(
    spec: ServeSpec,
    model: ServedModel,
    environment: dict[str, Any],
    secret: bytes,
    code: OwnCode | None,
    nodes: list[Node],
    there: Mapping[str, int],
) -> ray_serve.RunTarget:
    settings, app = spec.models[model.name], model_app(spec.name, model.name)
    deployment = ray_serve.deployment(ModelDeployment).options(
        name=ENGINE,
        **ray_serve_internals.pinned(f"{model.digest()}-{_of_secret(secret)}"),
        user_config={"drain_s": spec.drain_s},
        ray_actor_options={
            "num_cpus": settings.resources.cpus_per_replica,
            "num_gpus": settings.resources.gpus_per_replica,
            "runtime_env": {**warm.executable(model, settings), **merged(environment, settings.runtime_env)},
        },
        logging_config=LoggingConfig(enable_access_log=False),  # the gateway keeps one
        max_surge_percent=100 if checks.fits_beside(settings, nodes) else 0,
        num_replicas=scaling.begin(settings, there.get(app)),
        **_lifecycle(spec),
    )
    # Inside the deployment, not as a package of Ray's: cluster/shipping.py says why.
    carried = (code.packed,) if code is not None and model.code is not None else ()
    bound = deployment.bind(spec.name, model, secret, *carried)
    return ray_serve.RunTarget(bound, name=app, route_prefix=None, external_scaler_enabled=settings.scales)


def _gateway_target(
    spec: ServeSpec,
    models: list[ServedModel],
    environment: dict[str, Any],
    secret: bytes,
    there: Mapping[str, int],
    at: Address,
    certificate: str | None,
) -> ray_serve.RunTarget:
    gateway: GatewaySpec = spec.gateway
    settings = GatewaySettings(
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
    deployment = ray_serve.deployment(GatewayDeployment).options(
        name=GATEWAY,
        **ray_serve_internals.pinned(f"{json.dumps(asdict(settings))}-{_of_secret(secret)}"),
        max_ongoing_requests=10_000,
        user_config={
            "catalog": [_card(model, spec) for model in models],
            "operator": secrets.token_urlsafe(32),
            "scaling": scaling.plans(spec, {model.name: model.digest() for model in models}),
            "address": at._asdict(),
        },
        ray_actor_options={
            "num_cpus": gateway.cpus_per_replica,
            "runtime_env": merged(environment, {"env_vars": ray_serve_internals.ONE_LOOP}),
            **address.placement(spec.http),
        },
        max_surge_percent=100,
        num_replicas=scaling.begin(gateway, there.get(spec.name)),
        **_lifecycle(spec),
    )
    bound = deployment.bind(settings, secret)
    return ray_serve.RunTarget(bound, name=spec.name, route_prefix=None, external_scaler_enabled=gateway.scales)


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


def _card(model: ServedModel, spec: ServeSpec) -> dict[str, Any]:
    fields, settings = asdict(model), spec.models[model.name]
    card = {key: fields[key] for key in ("name", "task", "version", "generates", "created", "details")}
    share = settings.max_queued_per_key or max(1, settings.max_queued // 2)
    per_key = share if spec.asks_for_keys else settings.max_queued  # without keys all are one
    queue = asdict(Queue(settings.max_batch, settings.max_queued, per_key))
    return {**card, "queue": queue, "sleeps": settings.bounds.min == 0}


def _replica_environment() -> dict[str, Any]:
    """Return what replicas need of this job's environment: Tandem's code, and the addresses it uses.

    Not all of it: a job's environment differs each time, and each difference would restart every replica.
    """
    modules = ray.get_runtime_context().runtime_env.get("py_modules")
    env_vars = {name: os.environ[name] for name in REPLICA_ENV if name in os.environ}
    return {"env_vars": env_vars, **({"py_modules": modules} if modules else {})}


def merged(environment: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Return a model's own runtime environment on top of what every replica needs, Tandem's code among it."""
    return {**environment, **own, "env_vars": {**environment["env_vars"], **own.get("env_vars", {})}}


def _running_address(name: str) -> Address | None:
    """Return where the gateways of the endpoint `name` listen now."""
    if not address.is_running():
        return None
    details = ray_serve_internals.serve_details(connect.job_client().get_address())
    found = ray_serve_internals.gateway_config(details.get("applications", {}).get(name, {})).get("address")
    return Address(**found) if found else None


def _own_apps(name: str) -> set[str]:
    return {app for app in ray_serve.status().applications if app == name or app.startswith(f"{name}.")}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
