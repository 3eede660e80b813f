"""Waiting for what was deployed: what changes is told meanwhile, and what is missing."""

from __future__ import annotations

import time
from typing import Any, Protocol

from ray import serve as ray_serve

from cluster import connect, topology
from cluster.errors import UserError
from serve import runtime_env
from serve.deploy import address, causes, ray_serve_internals, room

POLL_S = 0.25
ROOM_EVERY_S = 3.0
"""Replicas are placed within a second where there is room."""


class Tell(Protocol):
    """Passes progress on to the user."""

    def __call__(self, *, progress: str) -> None: ...


def until_running(names: list[str], timeout_s: float, tell: Tell) -> None:
    """Print what changes until all applications run. Raises UserError when one fails or time is up."""
    deadline = time.monotonic() + timeout_s
    said: dict[str, str] = {}
    look = _Room()
    while True:
        applications = ray_serve.status().applications
        for name in names:
            line = _progress(applications.get(name), look.lacking().get(name))
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


def _lacking_now() -> dict[str, str]:
    try:
        details = ray_serve_internals.serve_details(connect.job_client().get_address())
    except OSError:  # it is told again in a moment; whether Serve answers at all is watched elsewhere
        return {}
    return room.lacking(details.get("applications", {}), topology.nodes())


def _progress(application: Any, lacking: str | None) -> str:
    if application is None or not application.deployments:
        return "deploying"
    overview = next(iter(application.deployments.values()))
    states = ", ".join(f"{count} {state.lower()}" for state, count in sorted(overview.replica_states.items()))
    told = f"{application.status.value.lower()} ({states or 'no replicas yet'})"
    return f"{told}: {lacking}" if lacking and application.status.value != "RUNNING" else told


def until_listening(timeout_s: float) -> None:
    """Wait until every node that is to listen does. Raises UserError with those that do not."""
    deadline = time.monotonic() + timeout_s
    while dead := address.silent_proxies(ray_serve.status().proxies):
        if time.monotonic() < deadline:
            time.sleep(POLL_S)
            continue
        where = ray_serve_internals.listens_on()
        raise UserError(
            f"Ray Serve cannot listen on {where} of node {', '.join(node[:8] for node in dead)}: is "
            "the port taken there? `tandem serve down`, then name another http.port; or http.proxies: head"
        )


def _raise_if_failed(applications: Any, states: dict[str, str]) -> None:
    for name, state in states.items():
        if state == "DEPLOY_FAILED":
            messages = [overview.message for overview in applications[name].deployments.values()]
            reason = " ".join(filter(None, messages)) or applications[name].message
            raise UserError(f"{name} could not be deployed: {causes.plain(runtime_env.sentence(reason))}")
