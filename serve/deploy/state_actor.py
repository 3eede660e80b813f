"""Where replicas tell how they are: one small actor per endpoint, written twice a second, read for status and health.

Scaling looks at the reports where they are: the loop of serve/deploy/scaler.py runs in the actor.

Asking the replicas instead goes through their request slots: a replica that is full would answer last, just when one
wants to know (ray 2.60: `handle.broadcast` waits for `max_ongoing_requests` like any request).
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from serve.deploy import ray_serve_internals
from serve.deploy.scaler import Scaler
from serve.metrics.departed import Departed

logger = logging.getLogger(__name__)
NAMESPACE = "tandem"
REPORT_INTERVAL_S = 0.5
SOON_S = 0.05
"""How soon after a report the next one may be."""
FRESH_S = 10.0
"""A replica that has been silent for longer is gone, or too busy to count on."""
ASK_TIMEOUT_S = 2.0
START_TIMEOUT_S = 60.0
SECRET_BYTES = 32


class StateActor:
    """The actor: the last report of each sender, the endpoint's secret, and the scaling that follows from the reports.

    Ray runs it on one loop.
    """

    def __init__(self, name: str = "", secret: bytes = b"") -> None:
        """`secret`: by what gateways and replicas know each other."""
        self._reports: dict[str, tuple[float, Any]] = {}
        self._secret = secret
        self._departed = Departed()
        self._scaler = Scaler(name, self._fresh, ray_serve_internals.ControllerHandle())

    def secret(self) -> bytes:
        return self._secret

    def report(self, sender: str, value: Any) -> None:
        self._reports[sender] = (time.monotonic(), value)
        self._scaler.heard(value)

    def leave(self, sender: str) -> None:
        self._forget(sender)

    async def deployed(self) -> None:
        """Take note that `serve up` has changed what there is."""
        self._scaler.ask_anew()

    def read(self) -> list[Any]:
        """Return every fresh report, forgetting the others, and what scaling has decided."""
        decided = self._scaler.state()
        left = self._departed.read(time.monotonic())
        return [*self._fresh().values(), *left, *([decided] if decided.standings else [])]

    def _forget(self, sender: str) -> None:
        _, last = self._reports.pop(sender, (0.0, None))
        self._departed.add(time.monotonic(), last)

    def _fresh(self) -> dict[str, Any]:
        oldest = time.monotonic() - FRESH_S
        for silent in [sender for sender, (told, _) in self._reports.items() if told < oldest]:
            self._forget(silent)
        return {sender: value for sender, (_, value) in self._reports.items()}


class ActorInRay(StateActor):
    """The same in its own process, where its log is the actor's."""

    def __init__(self, name: str, secret: bytes) -> None:
        logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
        logging.getLogger("serve").setLevel(logging.INFO)
        super().__init__(name, secret)


def start(name: str, environment: dict[str, Any]) -> bytes:
    """Start the state actor of the endpoint `name`, unless it runs. It is detached, and comes back after a failure.

    Returns the endpoint's secret. It is the argument of the actor's constructor: Ray keeps that, so it is the same
    after a failure and for every `serve up`; no command line, no environment, no log and no status has it.
    """
    import ray

    actor = (
        ray.remote(ActorInRay)
        .options(
            name=_actor_name(name),
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            runtime_env=environment,
        )
        .remote(name, secrets.token_bytes(SECRET_BYTES))
    )
    secret: bytes = ray.get(actor.secret.remote(), timeout=START_TIMEOUT_S)
    return secret


def deployed(name: str) -> None:
    """Tell the state actor of `name` that what is deployed has changed. It need not answer."""
    actor = _find(name)
    if actor is not None:
        actor.deployed.remote()


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
        self._actor: Any = None
        self._failing = False
        self._asked = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
        self.tell()  # the last counts of one that leaves are kept
        if self._actor is not None:
            self._actor.leave.remote(self._sender)

    def tell(self) -> None:
        """Tell how it is now, before it is due. What fails is for the log: the next report may succeed."""
        if self._actor is None:
            return
        try:
            self._actor.report.remote(self._sender, self._state())
            self._failing = False
        except Exception:  # of whatever the state is made of, the user's own engine among it, and of Ray
            self._failed()

    def soon(self) -> None:
        """Report at once, and not only when it is time: somebody waits for a replica that is not there."""
        self._asked.set()

    async def _run(self) -> None:
        while True:
            await self._find()
            self.tell()
            await asyncio.sleep(SOON_S)  # however many ask
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._asked.wait(), REPORT_INTERVAL_S - SOON_S)
            self._asked.clear()

    async def _find(self) -> None:
        if self._actor is None:
            try:
                self._actor = await asyncio.to_thread(_find, self._name)  # it blocks while Ray is in trouble
            except Exception:  # a cluster in trouble
                self._failed()

    def _failed(self) -> None:
        if not self._failing:  # once, and not twice a second
            logger.exception("%s cannot tell how it is; it goes on trying", self._sender)
        self._failing = True


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
            self._actor = self._actor or await asyncio.to_thread(_find, self._name)  # it blocks while Ray is in trouble
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
