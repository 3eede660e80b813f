"""The loop that scales an endpoint: it looks at the reports, decides, and sets numbers of replicas through Ray Serve.

It runs in the state actor, where the reports are. Looks go on while Serve's controller is asked, hangs or is gone: what
was decided is kept, and tried again. What may scale stands in the gateway's configuration, which Serve keeps, so that
an actor that was started again knows all but the speeds; it goes on from the numbers that Serve aims at.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from serve.deploy.names import ENGINE, GATEWAY, model_app
from serve.scaling.decider import Decider, Plan
from serve.scaling.decisions import GATEWAY_ROW, ScalingState
from serve.wire import GatewayState

logger = logging.getLogger(__name__)

BUSY = "UPDATING"
"""Status of a deployment whose replicas `serve up` replaces: it is left alone until that is done."""


class Pace(NamedTuple):
    """How often what is done, in seconds."""

    look: float = 0.5
    refresh: float = 5.0
    """Between two questions to Serve what it aims at, where nothing is to be set."""
    idle_refresh: float = 60.0
    """The same, where nothing scales."""
    retry: float = 1.0
    answer: float = 5.0
    """So long Serve's controller may take to answer."""


class Control(Protocol):
    """Serve's controller, as far as scaling needs it."""

    async def details(self) -> dict[str, Any]:
        """Return what Serve's REST API tells."""
        ...

    async def set_replicas(self, application: str, deployment: str, count: int) -> None:
        """Have a deployment aim at so many replicas."""
        ...


class Aim(NamedTuple):
    """What Serve does with one deployment now."""

    replicas: int
    updating: bool


class View(NamedTuple):
    """What Serve tells of one endpoint."""

    plans: dict[str, Plan]
    """By model, and `GATEWAY_ROW`: what may scale."""
    aims: dict[str, Aim]


class Scaler:
    """Scales the endpoint `name` from `start` to `stop`."""

    def __init__(
        self, name: str, reports: Callable[[], Mapping[str, Any]], control: Control, pace: Pace | None = None
    ) -> None:
        """`reports` returns the fresh reports by sender."""
        self._name, self._reports, self._control, self._pace = name, reports, control, pace or Pace()
        self._decider = Decider()
        self._refresh_at = -math.inf
        self._updating: set[str] = set()
        self._silent = False
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._acting: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look, unless it looks already."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    def ask_anew(self) -> None:
        """Ask Serve at the next look, and not only when it is time: `serve up` has changed something."""
        self._refresh_at = -math.inf

    async def stop(self) -> None:
        """End, also what is on its way to Serve."""
        for task in filter(None, (self._task, self._acting)):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self._task = self._acting = None

    def heard(self, report: Any) -> None:
        """Begin with the first gateway that has something to scale; look at once where one has work for none."""
        if isinstance(report, GatewayState) and report.scales:
            self.start()
            if self._decider.asleep(report):
                self._wake.set()

    def state(self) -> ScalingState:
        """Return what was decided."""
        return self._decider.state()

    def memory(self) -> dict[str, Any]:
        """Return as plain data what was learned, for whoever goes on with scaling."""
        return self._decider.memory()

    def recall(self, memory: Mapping[str, Any]) -> None:
        """Go on from what another one had learned."""
        self._decider.recall(memory)

    async def _run(self) -> None:
        while True:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._wake.wait(), self._pace.look)
            self._wake.clear()
            try:
                self._look()
            except Exception:  # a fault of ours must not end scaling; the next look begins with new reports
                logger.exception("scaling: a look failed")

    def _look(self) -> None:
        for name, change in self._decider.look(time.monotonic(), time.time(), self._reports()).items():
            logger.info("%s: %d -> %d replicas: %s", name, change.before, change.after, change.reason)
        idle = self._acting is None or self._acting.done()
        now = time.monotonic()
        if idle and (now >= self._refresh_at or set(self._decider.wanted()) - self._updating):
            self._acting = asyncio.get_running_loop().create_task(self._act())

    async def _act(self) -> None:
        try:
            await asyncio.wait_for(self._apply(), self._pace.answer)
            self._silent = False
        except Exception as error:  # whatever Ray raises; it is tried again
            if not self._silent:
                logger.warning("Ray Serve's controller does not answer (%s): it is asked again", type(error).__name__)
            self._silent = True
            for name, count in self._decider.wanted().items():
                self._decider.applied(name, count, refused="Ray Serve's controller does not answer")
            self._refresh_at = time.monotonic() + self._pace.retry
            await asyncio.sleep(self._pace.retry)

    async def _apply(self) -> None:
        """Ask Serve what it aims at, and set what was decided otherwise."""
        view = seen(self._name, await self._control.details())
        self._decider.know(view.plans, {name: view.aims[name].replicas for name in view.plans})
        self._updating = {name for name in view.plans if view.aims[name].updating}
        pace = self._pace
        again_s = pace.retry if self._updating else pace.refresh if view.plans else pace.idle_refresh
        self._refresh_at = time.monotonic() + again_s
        for name, count in self._decider.wanted().items():
            if name in self._updating:
                self._decider.applied(name, count, refused="`serve up` is at work")
                continue
            await self._control.set_replicas(*_place(self._name, name), count)
            self._decider.applied(name, count)


def seen(name: str, details: Mapping[str, Any]) -> View:
    """Read what Serve tells of the endpoint `name`: what may scale, and what it aims at. Pure."""
    applications = details.get("applications", {})
    gateway = applications.get(name, {}).get("deployments", {}).get(GATEWAY, {})
    written = ((gateway.get("deployment_config") or {}).get("user_config") or {}).get("scaling", {})
    plans, aims = {}, {}
    for row, told in written.items():
        application, deployment = _place(name, row)
        found = applications.get(application, {}).get("deployments", {}).get(deployment)
        if found is not None:
            plans[row] = Plan.read(told)
            aims[row] = Aim(int(found["target_num_replicas"]), str(found["status"]) == BUSY)
    return View(plans, aims)


def _place(name: str, row: str) -> tuple[str, str]:
    """Return the application and the deployment of a model, or of the gateway."""
    return (name, GATEWAY) if row == GATEWAY_ROW else (model_app(name, row), ENGINE)
