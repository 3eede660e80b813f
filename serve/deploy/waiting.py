"""Waiting for what was deployed: what changes is told meanwhile, and what is missing."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, Protocol

from ray import serve as ray_serve

from cluster import connect, topology
from cluster.errors import UserError
from serve import runtime_env
from serve.deploy import causes, ray_serve_internals, room, state_actor
from serve.deploy.names import model_app
from serve.front import client
from serve.wire import Fetching, GatewayState

POLL_S = 0.25
FETCHES_EVERY_S = 1.0
ROOM_EVERY_S = 3.0
"""Replicas are placed within a second where there is room."""


class Tell(Protocol):
    """Passes progress on to the user."""

    def __call__(self, *, progress: str) -> None: ...


def until_running(endpoint: str, names: list[str], timeout_s: float, tell: Tell) -> None:
    """Print what changes until all applications of an endpoint run.

    Raises:
        UserError: one fails, or time is up.
    """
    deadline = time.monotonic() + timeout_s
    said: dict[str, str] = {}
    look, fetching = _Room(), _Fetches(endpoint)
    while True:
        applications = ray_serve.status().applications
        for name in names:
            line = _progress(applications.get(name), look.lacking().get(name) or fetching.now().get(name))
            if line != said.get(name):
                tell(progress=f"{name}: {line}")
                said[name] = line
        states = {name: str(applications[name].status.value) for name in names if name in applications}
        _raise_if_failed(applications, states)
        if len(states) == len(names) and set(states.values()) == {"RUNNING"}:
            return
        if time.monotonic() > deadline:
            waiting = ", ".join(f"{name} ({said[name]})" for name in names if states.get(name) != "RUNNING")
            raise UserError(f"not ready after {timeout_s:g} s: {waiting}; see `tandem serve status`")
        time.sleep(POLL_S)


class _Room:
    """What the cluster lacks for replicas that wait, looked at every few seconds.

    Told when two looks in a row say so: Serve names the node of a replica a moment after the replica has taken it.
    """

    def __init__(self) -> None:
        self._next = time.monotonic() + ROOM_EVERY_S
        self._lacking: dict[str, str] = {}
        self._seen: set[str] = set()

    def lacking(self) -> dict[str, str]:
        if time.monotonic() >= self._next:
            found = _lacking_now()
            self._lacking = {name: sentence for name, sentence in found.items() if name in self._seen}
            self._seen = set(found)
            self._next = time.monotonic() + ROOM_EVERY_S
        return self._lacking


class _Fetches:
    """What nodes fetch from stores before their replicas load it, asked for every second."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint, self._next = endpoint, time.monotonic() + FETCHES_EVERY_S
        self._told: dict[str, str] = {}

    def now(self) -> dict[str, str]:
        """Return a sentence by application."""
        if time.monotonic() >= self._next:
            told = [each for each in state_actor.read_now(self._endpoint) if isinstance(each, Fetching)]
            self._told = fetches(self._endpoint, told)
            self._next = time.monotonic() + FETCHES_EVERY_S
        return self._told


def fetches(endpoint: str, told: Iterable[Fetching]) -> dict[str, str]:
    """Say what is being fetched, by the model's application. Pure."""
    nodes: dict[tuple[str, str], set[str]] = {}
    for each in told:
        nodes.setdefault((each.model, each.place), set()).add(each.node)
    return {
        model_app(endpoint, model): f"{', '.join(sorted(names))} fetch{'es' if len(names) == 1 else ''} {place}"
        for (model, place), names in nodes.items()
    }


def _lacking_now() -> dict[str, str]:
    try:
        details = ray_serve_internals.serve_details(connect.job_client().get_address())
    except OSError:  # it is told again in a moment; whether Serve answers at all is watched elsewhere
        return {}
    return room.lacking(details.get("applications", {}), topology.nodes())


def _progress(application: Any, waits_for: str | None) -> str:
    if application is None or not application.deployments:
        return "deploying"
    overview = next(iter(application.deployments.values()))
    states = ", ".join(f"{count} {state.lower()}" for state, count in sorted(overview.replica_states.items()))
    told = f"{application.status.value.lower()} ({states or 'no replicas yet'})"
    return f"{told}: {waits_for}" if waits_for and application.status.value != "RUNNING" else told


def until_listening(name: str, port: int, certificate: str | None, timeout_s: float) -> None:
    """Wait until each gateway of the endpoint `name` says where it listens, and answers there.

    Raises:
        UserError: with those that do not.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        told = state_actor.read_now(name)
        states = [state.address for state in told if isinstance(state, GatewayState)]
        there = sorted({each for each in states if each.endswith(f":{port}")})
        silent = [each for each in there if not client.answers(each, certificate)]
        if there and not silent:
            return
        if time.monotonic() > deadline:
            where = f"on {', '.join(silent)}" if silent else f"anywhere on port {port}"
            raise UserError(f"no gateway answers {where} after {timeout_s:g} s: see `tandem serve status`")
        time.sleep(POLL_S)


def _raise_if_failed(applications: Any, states: dict[str, str]) -> None:
    for name, state in states.items():
        if state == "DEPLOY_FAILED":
            messages = [overview.message for overview in applications[name].deployments.values()]
            reason = " ".join(filter(None, messages)) or applications[name].message
            raise UserError(f"{name} could not be deployed: {causes.plain(runtime_env.sentence(reason))}")
