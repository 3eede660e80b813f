"""Where replicas tell how they are: one small actor per endpoint, written twice a second, read for status and health.

Scaling looks at the reports where they are: the loop of serve/deploy/scaler.py runs in the actor. Senders and readers
of several versions of Tandem may live at once, while `serve up` replaces them: reports of another shape than the
actor's own stay sealed, and go to those readers that have it (serve/deploy/shapes.py).

Asking the replicas instead goes through their request slots: a replica that is full would answer last, just when one
wants to know (ray 2.60: `handle.broadcast` waits for `max_ongoing_requests` like any request).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from typing import Any, NamedTuple

from serve.deploy import ray_serve_internals, succession
from serve.deploy.scaler import Scaler
from serve.deploy.shapes import Stranger, seal, shape_of, unseal
from serve.deploy.succession import START_S, Generation, Moved, Say
from serve.metrics.departed import Departed, LeftGateway
from serve.scaling.decisions import Change, ScalingState, Standing
from serve.wire import Fetching, GatewayState, Load, ReplicaState, Work

logger = logging.getLogger(__name__)
FRESH_S = 10.0
"""A replica that has been silent for longer is gone, or too busy to count on."""
ASK_TIMEOUT_S = 2.0
SECRET_BYTES = 32
SHAPE = shape_of(ReplicaState, Fetching, Load, GatewayState, Work, LeftGateway, ScalingState, Standing, Change)
"""Of what senders tell here, and of what readers are told."""
KNOWN_FORMAT = 1
"""Of what one actor hands over to the next: its parts are plain data, and each says what it is."""


class Report(NamedTuple):
    """The last report of one sender."""

    told: float
    """When, by this process's steady clock."""
    shape: str
    sealed: bytes
    value: Any
    """What was told; None where its shape is not this actor's."""


class StateActor:
    """The actor: the last report of each sender, the endpoint's secret, and the scaling that follows from the reports.

    Ray runs it on one loop.
    """

    def __init__(self, name: str = "", secret: bytes = b"", version: str = "") -> None:
        """`secret`: by what gateways and replicas know each other. `version`: of the code that runs here."""
        self._reports: dict[str, Report] = {}
        self._secret, self._version = secret, version
        self._moved: Moved | None = None
        self._departed = Departed()
        self._scaler = Scaler(name, self._known, ray_serve_internals.ControllerHandle())

    def secret(self) -> bytes:
        return self._secret

    def report(self, sender: str, shape: str, sealed: bytes) -> Moved | Stranger | None:
        """Take a report; returns where to tell it instead, or that this actor does not know its shape."""
        return self._moved or self._keep(sender, shape, sealed, time.monotonic())

    def leave(self, sender: str) -> None:
        self._forget(sender)

    async def deployed(self) -> None:
        """Take note that `serve up` has changed what there is."""
        self._scaler.ask_anew()

    def read(self, shape: str) -> Moved | list[bytes]:
        """Return, sealed, every fresh report of a shape, forgetting the others, and what scaling has decided."""
        if self._moved is not None:
            return self._moved
        reports = [report.sealed for report in self._fresh().values() if report.shape == shape]
        if shape != SHAPE:
            return reports
        decided = self._scaler.state()
        left = self._departed.read(time.monotonic())
        return [*reports, *map(seal, left), *([seal(decided)] if decided.standings else [])]

    # -- succession --------------------------------------------------------------------------------------------------

    def generation(self) -> Generation:
        """Say which code runs here, and whether another actor has taken over."""
        return Generation(self._version, self._moved is not None)

    async def hand_over(self, to: str) -> dict[str, Any]:
        """Return what is known here, as plain data; the actor called `to` is the one to ask from now on."""
        self._moved = Moved(to)
        await self._scaler.stop()
        now = time.monotonic()
        reports = {name: (now - each.told, each.shape, each.sealed) for name, each in self._fresh().items()}
        return {
            "format": KNOWN_FORMAT,
            "reports": reports,
            "departed": self._departed.told(now),
            "scaling": self._scaler.memory(),
        }

    async def take_over(self, predecessor: Any, name: str) -> bool:
        """Take what the predecessor knows; `name` is this actor's. Tells whether it could be read."""
        told = await asyncio.wait_for(predecessor.hand_over.remote(name), succession.ANSWER_S)
        if told.get("format") != KNOWN_FORMAT:
            logger.warning("what the actor before has handed over has another format: it is left out")
            return False
        now = time.monotonic()
        self._scaler.recall(told["scaling"])
        self._departed.take(now, told["departed"])
        for sender, (age_s, shape, sealed) in told["reports"].items():
            if sender not in self._reports:  # it may have told by itself since
                self._keep(sender, shape, sealed, now - age_s)
        return True

    # -- inside ------------------------------------------------------------------------------------------------------

    def _keep(self, sender: str, shape: str, sealed: bytes, told: float) -> Stranger | None:
        if shape != SHAPE:
            before = self._reports.get(sender)
            if before is None or before.shape != shape:
                logger.warning(
                    "%s tells in the shape %s, and %s is known here: it runs another version of Tandem, and scaling "
                    "does not count it; `tandem serve up` replaces it",
                    *(sender, shape, SHAPE),
                )
            self._reports[sender] = Report(told, shape, sealed, None)
            return Stranger(SHAPE)
        value = unseal(sealed)
        self._reports[sender] = Report(told, shape, sealed, value)
        self._scaler.heard(value)
        return None

    def _forget(self, sender: str) -> None:
        last = self._reports.pop(sender, None)
        self._departed.add(time.monotonic(), last and last.value)

    def _fresh(self) -> dict[str, Report]:
        oldest = time.monotonic() - FRESH_S
        for silent in [sender for sender, report in self._reports.items() if report.told < oldest]:
            self._forget(silent)
        return self._reports

    def _known(self) -> dict[str, Any]:
        """Return what was told in this actor's own shape, by sender."""
        return {sender: report.value for sender, report in self._fresh().items() if report.shape == SHAPE}


class ActorInRay(StateActor):
    """The same in its own process, where its log is the actor's."""

    def __init__(self, name: str, secret: bytes, version: str) -> None:
        logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
        logging.getLogger("serve").setLevel(logging.INFO)
        super().__init__(name, secret, version)


def start(name: str, environment: dict[str, Any], say: Say) -> bytes:
    """Start the state actor of the endpoint `name`, unless it runs this code. It comes back after a failure.

    Returns the endpoint's secret. It is the argument of the actor's constructor: Ray keeps that, so it is the same
    after a failure and for every `serve up`; no command line, no environment, no log and no status has it.
    """
    import ray

    def begin(actor_name: str, predecessor: Any | None) -> Any:
        secret = _secret_of(predecessor) or secrets.token_bytes(SECRET_BYTES)
        options = succession.options(actor_name, environment)
        return ray.remote(ActorInRay).options(**options).remote(name, secret, succession.code_version())

    actor = succession.ensure(_base(name), begin, say)
    secret: bytes = ray.get(actor.secret.remote(), timeout=START_S)
    return secret


def _secret_of(actor: Any | None) -> bytes | None:
    """Return the secret of an actor that runs; with another one all replicas would be replaced."""
    import ray
    from ray.exceptions import RayError

    if actor is None:
        return None
    try:
        secret: bytes = ray.get(actor.secret.remote(), timeout=succession.ANSWER_S)
        return secret
    except RayError:
        return None


def deployed(name: str) -> None:
    """Tell the state actor of `name` that what is deployed has changed. It need not answer."""
    actor = find(name)
    if actor is not None:
        actor.deployed.remote()


def stop(name: str) -> None:
    """End the state actor of `name`, if there is one."""
    succession.stop(_base(name))


def read_now(name: str) -> list[Any]:
    """Return the fresh reports to a caller without a loop; none where the actor does not answer in time."""
    import ray
    from ray.exceptions import RayError

    actor = find(name)
    try:
        told = ray.get(actor.read.remote(SHAPE), timeout=ASK_TIMEOUT_S) if actor is not None else []
    except RayError:
        return []
    return [] if isinstance(told, Moved) else [unseal(each) for each in told]


def find(name: str) -> Any | None:
    """Return the state actor of the endpoint `name`, where there is one."""
    return succession.find(_base(name))


def _base(name: str) -> str:
    return f"state:{name}"
