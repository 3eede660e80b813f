"""How long a request waits while its model has no replica: `WAIT_S`, or its patience where one is on its way.

A request that waits behind others for a replica that runs is no case for this: it waits for its turn.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol

from serve.api.body import ApiError
from serve.deploy import ray_serve_internals

WAIT_S = 30.0
"""A model that has had no replica for so long answers 503, unless one is being started for it and nothing failed."""
HOPELESS_S = 10.0
"""For so long no replica must have been on its way: the one that takes the room of one that has just gone is seen by
Serve only when its process is there."""
CHECK_S = 1.0
STATUS_TIMEOUT_S = 5.0
RETRY_AFTER_S = 10
"""Where no replica of the model has told yet how long it takes to be ready."""
PLACED_S = 2.0
"""What passes between a replica's being wanted and its beginning to load."""


class Why(NamedTuple):
    """Why a model has no replica."""

    reason: str
    hopeful: bool
    """Whether one is on its way, so that a request waits for it as long as its client does."""


Reason = Callable[[], Awaitable[Why]]


class Waits(Protocol):
    """What is watched: the calls that wait for one model."""

    @property
    def usable(self) -> bool:
        """Whether there is a replica that takes calls."""
        ...

    def give_up(self, longer_than_s: float, why: str) -> None:
        """Refuse the calls that have waited for so long while there was no replica."""
        ...

    def overdue(self, longer_than_s: float) -> bool:
        """Whether there are such calls."""
        ...


async def watch(
    waits: Waits,
    reason: Reason,
    wait_s: float = WAIT_S,
    check_s: float = CHECK_S,
    hopeless_s: float = HOPELESS_S,
) -> None:
    """Refuse, as long as this runs, the calls of a model that have waited too long for a replica to appear."""
    clock = asyncio.get_running_loop().time
    hopeless_since: float | None = None
    while True:
        await asyncio.sleep(check_s)
        if waits.usable or not waits.overdue(wait_s - hopeless_s):
            hopeless_since = None
            continue
        why = await reason()
        if why.hopeful:
            hopeless_since = None
            continue
        hopeless_since = clock() if hopeless_since is None else hopeless_since
        if clock() - hopeless_since >= hopeless_s:
            waits.give_up(wait_s, why.reason)


def unavailable(model: str, why: str, start_s: float | None = None) -> ApiError:
    """Return the answer for a model that no replica can answer for.

    Args:
        start_s: how long a replica of it has taken to be ready; to be tried again when the next one could be.
    """
    message = f"{model!r} has no replica that is ready: {why}"
    retry_s = RETRY_AFTER_S if start_s is None else math.ceil(PLACED_S + start_s)
    return ApiError(503, message, code="not_ready", headers={"retry-after": str(retry_s)})


def why_none(application: Any | None, placed: int = 0) -> Why:
    """Say why an application has no replica that answers. Pure.

    Args:
        application: the `ApplicationStatusOverview` of Ray Serve; None where there is none of that name. What was
            raised stays in `serve status`: it may name files, which are none of a client's business.
        placed: its replicas that start and have found room: that they waited for it is still told meanwhile.
    """
    if application is None:
        return Why("it is not deployed", hopeful=False)
    overviews = list(application.deployments.values())
    counts = {str(getattr(k, "value", k)): n for each in overviews for k, n in each.replica_states.items()}
    if counts.get("RUNNING"):
        return Why("its replicas do not answer", hopeful=True)  # they are about to tell of themselves, or to be ended
    if any("failed to start" in each.message or each.status.value == "DEPLOY_FAILED" for each in overviews):
        return Why("its replicas fail while they start; `tandem serve status` on the server has the reason", False)
    if waits_for_room(application) and not placed:
        said = "the cluster has no room for its replicas; `tandem serve status` on the server says what is missing"
        return Why(said, hopeful=bool(counts.get("STOPPING")))  # those that leave make room
    coming = counts.get("STARTING") or counts.get("UPDATING") or counts.get("RECOVERING") or counts.get("STOPPING")
    said = "its replicas are starting" if counts.get("STARTING") else "it is being started"
    deploying = str(getattr(application.status, "value", application.status)) == "DEPLOYING"
    return Why(said, hopeful=bool(coming) or deploying)


def waits_for_room(application: Any) -> bool:
    """Whether Serve says of an application's replicas that they have found no room; it does not say when they have."""
    return any("scheduled" in each.message for each in application.deployments.values())


def count_placed(application: Mapping[str, Any]) -> int:
    """Return how many replicas start on a node, from what Serve's REST API tells of an application. Pure."""
    replicas = (each for deployment in application["deployments"].values() for each in deployment["replicas"])
    return sum(str(each["state"]) == "STARTING" and bool(each.get("node_id")) for each in replicas)


class Question:
    """A question that may hang: open once at a time, in a thread of its own; whoever asks meanwhile shares it.

    So it fills no pool of threads that others need, and holds up no end of the process.
    """

    def __init__(self, ask: Callable[[], Any]) -> None:
        self._ask = ask
        self._open: Future[Any] | None = None

    async def answer(self, timeout_s: float) -> Any:
        """Return the answer. Raises what the question raises, and asyncio.TimeoutError where it takes longer."""
        if self._open is None or self._open.done():
            self._open = Future()
            self._open.set_running_or_notify_cancel()  # those that wait no longer cancel it for nobody
            threading.Thread(target=self._answer, args=(self._open,), daemon=True).start()
        return await asyncio.wait_for(asyncio.wrap_future(self._open), timeout_s)

    def _answer(self, future: Future[Any]) -> None:
        try:
            future.set_result(self._ask())
        except BaseException as error:  # whoever waits is told
            future.set_exception(error)


def _serve_status() -> Any:
    from ray import serve as ray_serve

    return ray_serve.status()


_STATUS = Question(_serve_status)
_DETAILS = Question(ray_serve_internals.running_applications)


async def ask_why(application: str) -> Why:
    """Ask Serve's controller for the reason; one that does not answer is a reason as well."""
    try:
        found = (await _STATUS.answer(STATUS_TIMEOUT_S)).applications.get(application)
        if found is None or not waits_for_room(found):
            return why_none(found)
        details = await _DETAILS.answer(STATUS_TIMEOUT_S)
    except Exception:  # whatever keeps Serve from answering, the client gets an answer
        return Why("Ray Serve's controller does not answer", hopeful=False)
    return why_none(found, count_placed(details[application]) if application in details else 0)
