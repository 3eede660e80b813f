"""Where replicas tell how they are: one small actor per endpoint, written twice a second, read for status and health.

Asking the replicas instead goes through their request slots: a replica that is full would answer last, just when one
wants to know (ray 2.60: `handle.broadcast` waits for `max_ongoing_requests` like any request).
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from typing import Any

NAMESPACE = "tandem"
REPORT_INTERVAL_S = 0.5
FRESH_S = 10.0
"""A replica that has been silent for longer is gone, or too busy to count on."""
ASK_TIMEOUT_S = 2.0


class StateActor:
    """The actor: the last report of each sender."""

    def __init__(self) -> None:
        self._reports: dict[str, tuple[float, Any]] = {}

    def report(self, sender: str, value: Any) -> None:
        self._reports[sender] = (time.monotonic(), value)

    def leave(self, sender: str) -> None:
        self._reports.pop(sender, None)

    def read(self) -> list[Any]:
        """Return every fresh report, forgetting the others."""
        oldest = time.monotonic() - FRESH_S
        self._reports = {sender: entry for sender, entry in self._reports.items() if entry[0] >= oldest}
        return [value for _, value in self._reports.values()]


def start(name: str, environment: dict[str, Any]) -> None:
    """Start the state actor of the endpoint `name`, unless it runs. It is detached, and comes back after a failure."""
    import ray

    ray.remote(StateActor).options(
        name=_actor_name(name),
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_restarts=-1,
        runtime_env=environment,
    ).remote()


def stop(name: str) -> None:
    """End the state actor of `name`, if there is one."""
    import ray

    actor = _find(name)
    if actor is not None:
        ray.kill(actor)


def read_now(name: str) -> list[Any]:
    """Return the fresh reports to a caller without a loop; none where the actor does not answer in time."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError

    actor = _find(name)
    try:
        return list(ray.get(actor.read.remote(), timeout=ASK_TIMEOUT_S)) if actor is not None else []
    except (RayError, GetTimeoutError):
        return []


class Reporter:
    """Keeps one sender's report with the state actor fresh, from `start` to `stop`."""

    def __init__(self, name: str, sender: str, state: Callable[[], Any]) -> None:
        self._name = name
        self._sender = sender
        self._state = state
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
        actor = _find(self._name)
        if actor is not None:
            actor.leave.remote(self._sender)

    async def _run(self) -> None:
        actor = None
        while True:
            actor = actor or _find(self._name)
            if actor is not None:
                actor.report.remote(self._sender, self._state())
            await asyncio.sleep(REPORT_INTERVAL_S)


class Reader:
    """Reads the state actor of one endpoint: however many ask, it is asked as often as replicas tell."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._actor: Any = None
        self._last: list[Any] = []
        self._read_at = -math.inf
        self._asking: asyncio.Task[None] | None = None

    async def read(self) -> list[Any]:
        """Return the fresh reports; an actor that is slow to answer is quoted from the last time, while fresh."""
        if self._asking is None and time.monotonic() - self._read_at >= REPORT_INTERVAL_S / 2:
            self._asking = asyncio.get_running_loop().create_task(self._ask())
        if self._asking is not None:
            await asyncio.shield(self._asking)  # one of those that wait may leave
        return self._last if time.monotonic() - self._read_at < FRESH_S else []

    async def _ask(self) -> None:
        from ray.exceptions import RayError

        try:
            self._actor = self._actor or _find(self._name)
            if self._actor is not None:
                self._last = list(await asyncio.wait_for(self._actor.read.remote(), ASK_TIMEOUT_S))
                self._read_at = time.monotonic()
        except (RayError, asyncio.TimeoutError):
            self._actor = None
        finally:
            self._asking = None


def _actor_name(name: str) -> str:
    return f"state:{name}"


def _find(name: str) -> Any | None:
    import ray

    try:
        return ray.get_actor(_actor_name(name), namespace=NAMESPACE)
    except ValueError:
        return None
