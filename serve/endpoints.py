"""Deploy, look at and stop an endpoint, from wherever the cluster can be reached: this runs on the user's side.

`up` and `down` are Ray jobs of a few seconds that run `serve.deploy.app` on the cluster, which a remote one needs
and a local one does not mind; `status` reads Serve's own REST API and asks the gateway.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster import connect, shadows, shipping, topology
from cluster.errors import UserError
from serve import served, shortfalls
from serve.deploy import causes, ray_serve_internals, room
from serve.deploy.names import GATEWAY
from serve.deploy.where import Address
from serve.engines import table
from serve.front import client
from serve.scaling.decisions import GATEWAY_ROW
from serve.spec import ServeSpec
from serve.tracing import destination

Progress = Callable[[str], None]
MARK = "@tandem "
POLL_S = 0.3
LOG_LINES_SHOWN = 20
LOOK_AGAIN_S = 1.0


def up(spec: ServeSpec, progress: Progress = lambda _: None, path: Path | None = None) -> dict[str, Any]:
    """Deploy the spec and wait until it answers. Returns endpoint, name, and version and kind of each model.

    Model directories in the spec are absolute (`serve.deploy.plan.absolute`) and must be there on the cluster's nodes.
    `path` is the spec's file: where a model's task or engine is code of the user's own, it is sent from beside it.
    Raises UserError for anything the user can put right.
    """
    outcome = {}
    if not any(table.is_own(model.engine.name) for model in spec.models.values()):
        outcome = _run("up", [spec.model_dump_json(exclude_unset=True)], progress)
    if not outcome or "code_wanted" in outcome:
        outcome = _up_with_code(spec, progress, path, outcome.get("code_wanted", "the spec: its engine"))
    _wait_healthy(outcome["endpoint"], outcome.get("certificate"), spec.start_timeout_s, progress)
    served.remember(outcome, path)
    return outcome


def down(progress: Progress = lambda _: None) -> list[str]:
    """Stop the endpoint, and Ray Serve with it if nothing else uses it. Returns the applications that were stopped."""
    details: dict[str, Any] | None = None
    try:
        details = _details()
        name = _gateway_name(details)
    except ControllerSilent:  # the job ends it, and another one takes its place
        name = served.name()
    if details is not None and name is None and not details.get("controller_info", {}).get("actor_id"):
        served.forget()
        return []
    outcome = _run("down", [name or "tandem"], progress)
    if left := shortfalls.left_over(_details().get("applications", {}), name or "tandem"):
        raise UserError(f"{', '.join(left)} could not be stopped: run `tandem serve down` again, or end the cluster")
    served.forget()
    return list(outcome["stopped"])


def status() -> dict[str, Any] | None:
    """Return what runs: endpoint, and for each model its version, replicas, queue and speed. None: nothing does."""
    details = _details()
    name = _gateway_name(details)
    if name is None:
        return None
    applications = details["applications"]
    config = ray_serve_internals.gateway_config(applications[name])
    at, gateways = Address(**config["address"]), _gateways(applications[name])
    endpoint = _endpoint(at, gateways)
    live, scaled = _live(endpoint, at.certificate, config.get("operator")), config.get("scaling", {})
    lacking = _lacking(applications)
    rows = {app: GATEWAY_ROW if app == name else app.removeprefix(f"{name}.") for app in applications}
    states = {app: _model_status(applications[app], live.get(row, {}), scaled.get(row)) for app, row in rows.items()}
    for app, sentence in lacking.items():
        states[app]["no_room"] = sentence
    return {
        "endpoint": endpoint,
        "name": name,
        "reachable": bool(live) or not connect.connection().is_local,
        "certificate": at.certificate,
        "gateways": gateways,
        "gateway": states[name],
        "models": {app.removeprefix(f"{name}."): states[app] for app in sorted(states) if app.startswith(f"{name}.")},
    }


def endpoint() -> str:
    """Return the address of the endpoint that was last brought up from here, or else of the cluster's.

    Raises UserError when there is none.
    """
    return reached()[0]


def reached() -> tuple[str, str | None]:
    """Return the address as `endpoint` does, and the file of its own certificate, if it has one."""
    remembered = served.remembered()
    if remembered is not None and remembered.is_current:
        return remembered.endpoint, remembered.certificate
    running = status()
    if running is None:
        raise UserError(remembered.sentence if remembered else "nothing is served: run `tandem serve up SPEC` first")
    return str(running["endpoint"]), running["certificate"]


# -- jobs -------------------------------------------------------------------------------------------------------------


def _up_with_code(spec: ServeSpec, progress: Progress, path: Path | None, wanted: str) -> dict[str, Any]:
    """Deploy the spec with the small files beside it. `wanted` says what they are for."""
    if path is None:
        raise UserError(f"{wanted} is code of your own: deploy from a spec file that lies beside it")
    folder = path.absolute().parent
    progress(f"{wanted} is code of your own: sent along from {folder}")
    if kept := shadows.note(folder):
        progress(kept)
    # Without the spec: what it says of scaling may change without replacing replicas.
    with shipping.copied(folder, without=path.absolute()) as working_dir:
        return _run("up", [spec.model_dump_json(exclude_unset=True), str(folder)], progress, working_dir)


def _run(verb: str, arguments: list[str], progress: Progress, working_dir: Path | None = None) -> dict[str, Any]:
    """Run one verb of serve.deploy.app on the cluster, passing its progress on. Returns its outcome."""
    job_id = f"serve-{verb}-{secrets.token_hex(4)}"
    connect.submit(
        shlex.join(["python", "-m", "serve.deploy.app", verb, *arguments]),
        submission_id=job_id,
        working_dir=working_dir,
        env_vars={**ray_serve_internals.CONTROLLER_ENV, **_environment(), served.JOB: job_id},
        metadata={"tandem.name": job_id, "tandem.phase": f"serve {verb}"},
    )
    jobs = connect.job_client()
    seen = 0
    while True:
        ended = jobs.get_job_status(job_id).is_terminal()
        log = jobs.get_job_logs(job_id)
        whole = log[seen : log.rfind("\n") + 1]
        seen += len(whole)
        for message in _messages(whole):
            if "outcome" in message:
                return dict(message["outcome"])
            if "error" in message:
                raise UserError(message["error"])
            progress(message["progress"])
        if ended:
            raise UserError(f"job {job_id} failed: {_tail(jobs, job_id, log)}")
        time.sleep(POLL_S)


def _environment() -> dict[str, str]:
    """Return what a deploy job is told of this process's environment."""
    return {**destination.of_user(os.environ), **served.environment()}


def _messages(log: str) -> list[dict[str, Any]]:
    return [json.loads(line[len(MARK) :]) for line in log.splitlines() if line.startswith(MARK)]


def _tail(jobs: Any, job_id: str, log: str) -> str:
    lines = log.strip().splitlines()[-LOG_LINES_SHOWN:]
    return "\n".join([str(jobs.get_job_info(job_id).message), *lines])


# -- Serve's REST API -------------------------------------------------------------------------------------------------


class ControllerSilent(UserError):
    """Ray Serve's controller does not answer, so nobody knows what is served."""


def _details() -> dict[str, Any]:
    """Ask Serve's REST API. Raises UserError, ControllerSilent among them, when it does not tell."""
    address = connect.job_client().get_address()  # first: it sets the token that Ray reads when it is imported
    try:
        with connect.explained(address):
            return ray_serve_internals.serve_details(address)
    except TimeoutError as error:
        raise ControllerSilent(
            "Ray Serve's controller does not answer, so what is served is not known; models may answer all the same: "
            "`tandem serve up SPEC` and `tandem serve down` replace the controller first"
        ) from error
    except OSError as error:
        raise UserError(
            f"the cluster at {address} cannot tell what is served: {error}; try again in a minute"
        ) from error


def _gateway_name(details: dict[str, Any]) -> str | None:
    for name, application in details.get("applications", {}).items():
        if GATEWAY in application["deployments"] and "address" in ray_serve_internals.gateway_config(application):
            return str(name)
    return None


def _gateways(application: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the gateways there are: where each runs, and its state."""
    replicas = application["deployments"][GATEWAY]["replicas"]
    return [{key: replica.get(key) for key in ("replica_id", "state", "node_ip")} for replica in replicas]


def _endpoint(at: Address, gateways: list[dict[str, Any]]) -> str:
    listening = sorted(gateways, key=lambda gateway: gateway["state"] != "RUNNING")
    return at.url((listening[0]["node_ip"] if listening else None) or "127.0.0.1")


def _model_status(application: dict[str, Any], live: dict[str, Any], scaled: dict[str, Any] | None) -> dict[str, Any]:
    deployment = next(iter(application["deployments"].values()), None)
    replicas = deployment["replicas"] if deployment else []
    messages = [application["message"], deployment["message"] if deployment else ""]
    return {
        "status": application["status"],
        "replicas": {
            "running": sum(replica["state"] == "RUNNING" for replica in replicas),
            "target": deployment["target_num_replicas"] if deployment else 0,
            "least": _least(deployment["target_num_replicas"], scaled) if deployment else 0,
            "states": sorted(replica["state"] for replica in replicas),
        },
        "no_room": None,
        "message": " ".join(causes.plain(message) for message in messages if message),
        **{key: live.get(key) for key in ("version", "warning", "running", "queued", "tokens_per_second")},
        "scaling": live.get("scaling"),
    }


def _lacking(applications: dict[str, Any]) -> dict[str, str]:
    """Return what replicas find no room for, when a second look says so too.

    Serve names the node of a replica a moment after the replica has taken its CPUs.
    """
    lacking = room.lacking(applications, topology.nodes())
    if lacking:
        time.sleep(LOOK_AGAIN_S)
        again = room.lacking(_details().get("applications", {}), topology.nodes())
        lacking = {app: sentence for app, sentence in again.items() if app in lacking and app in applications}
    return lacking


def _least(target: int, scaled: dict[str, Any] | None) -> int:
    """Return how many replicas must run for nothing to be missing: fewer than wanted where load may add some. Pure.

    Args:
        scaled: what the gateway's configuration says of its scaling; None for a fixed number.
    """
    return target if scaled is None else min(int(scaled["bounds"]["least"]), target)


# -- the endpoint -----------------------------------------------------------------------------------------------------


def _live(endpoint: str, certificate: str | None, operator: str | None) -> dict[str, Any]:
    """Ask the gateway how busy the models are; an empty mapping when it does not answer (from) here.

    `operator`: the secret of the cluster's own commands, for an endpoint with keys.
    """
    answer = client.get(f"{endpoint}/status", certificate, operator)
    return dict(json.loads(answer)) if answer else {}


def _wait_healthy(endpoint: str, certificate: str | None, timeout_s: float, progress: Progress) -> None:
    """Wait for /health, where the endpoint can be reached from here at all: loopback of a remote head cannot."""
    if not connect.connection().is_local:
        return
    deadline = time.monotonic() + timeout_s
    while client.get(f"{endpoint}/health", certificate) is None:
        if time.monotonic() > deadline:
            raise UserError(f"{endpoint}/health is not ready after {timeout_s:g} s; see `tandem serve status`")
        time.sleep(POLL_S)
    progress(f"{endpoint}/health answers")
