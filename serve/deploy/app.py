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

import json
import os
import sys
import time
from typing import Any

import ray
from ray import serve as ray_serve

from cluster import connect, topology
from cluster.errors import UserError
from cluster.ports import Claims
from serve import served
from serve.deploy import (
    address,
    checks,
    controller,
    environment,
    plan,
    rates,
    ray_serve_internals,
    scaling,
    state_actor,
    targets,
    waiting,
)
from serve.deploy.own_code import CodeWanted, OwnCode
from serve.deploy.turns import turn
from serve.deploy.where import Address
from serve.endpoints import MARK
from serve.front import tls
from serve.spec import ServeSpec
from serve.tracing import begin, destination

DOWN_TIMEOUT_S = 60.0
"""How long `down` waits for an `up` that is at work."""
LISTENING_S = 30.0
"""A gateway that runs listens, and tells so within a second."""


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
    for sentence in begin.told(destination.of_replicas(os.environ)):
        _tell(progress=sentence)
    running = _running_address(spec.name)
    at = address.choose(spec.http, running, Claims())  # until this process ends: by then the gateways listen
    certificate = tls.check(spec.http.tls.certificate, spec.http.tls.key) if spec.http.tls else None
    address.start_serve()
    shared = environment.of_replicas()
    secret = state_actor.start(spec.name, shared, _say)
    if spec.asks_for_keys:
        if not checks.keys(spec, nodes):
            _tell(progress="warning: there are no keys yet, so that nobody can call: `tandem serve keys make NAME`")
        rates.start(spec.name, shared, _say)
    there = scaling.there()
    for sentence in checks.drained_first(spec, nodes, there):
        _tell(progress=sentence)
    endpoint = targets.Endpoint(spec, shared, secret, there)
    applications = [targets.model(endpoint, model, code, nodes) for model in models]
    applications.append(targets.gateway(endpoint, models, at, certificate))
    wanted = {application.name for application in applications}
    ray_serve.run_many(applications, wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    try:
        waiting.until_running(spec.name, sorted(wanted), spec.start_timeout_s, _tell)
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
