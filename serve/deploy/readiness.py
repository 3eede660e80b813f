"""How long a request waits for a replica of its model: while there is none, no longer than `WAIT_S`.

A request that waits behind others for a replica that runs is no case for this: it waits for its turn.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from serve.api.body import ApiError

WAIT_S = 30.0
"""A model that has had no replica for so long answers 503: its replicas fail, or find no room."""
CHECK_S = 1.0
STATUS_TIMEOUT_S = 5.0
RETRY_AFTER_S = 10

Answer = TypeVar("Answer")
HasReplica = Callable[[], Awaitable[bool]]
Reason = Callable[[], Awaitable[str | None]]


async def bounded(
    answer: Awaitable[Answer],
    model: str,
    has_replica: HasReplica,
    reason: Reason,
    wait_s: float = WAIT_S,
    check_s: float = CHECK_S,
) -> Answer:
    """Await the first answer of a model, which comes when a replica has taken the request.

    Args:
        has_replica: whether a replica of the model has told of itself lately.
        reason: why the model has no replica; None: it has one all the same, so that the request goes on waiting.

    Raises:
        ApiError: 503 with the reason, when there has been no replica for `wait_s`.
    """
    task = asyncio.ensure_future(answer)
    seen = time.monotonic()
    try:
        while not (await asyncio.wait({task}, timeout=check_s))[0]:
            if await has_replica():
                seen = time.monotonic()
            elif time.monotonic() - seen >= wait_s and not task.done():
                if (why := await reason()) is not None:
                    raise unavailable(model, why)
                seen = time.monotonic()
        return task.result()
    finally:
        if not task.done():
            task.cancel()


def unavailable(model: str, why: str) -> ApiError:
    """Return the answer for a model that no replica can answer for."""
    message = f"{model!r} has no replica that is ready: {why}"
    return ApiError(503, message, code="not_ready", headers={"retry-after": str(RETRY_AFTER_S)})


def why_none(application: Any | None) -> str | None:
    """Say why an application has no running replica; None: it has one. Pure.

    Args:
        application: the `ApplicationStatusOverview` of Ray Serve; None where there is none of that name. What was
            raised stays in `serve status`: it may name files, which are none of a client's business.
    """
    if application is None:
        return "it is not deployed"
    overviews = list(application.deployments.values())
    counts = {str(getattr(k, "value", k)): n for each in overviews for k, n in each.replica_states.items()}
    if counts.get("RUNNING"):
        return None
    if any("failed to start" in each.message or each.status.value == "DEPLOY_FAILED" for each in overviews):
        return "its replicas fail while they start; `tandem serve status` on the server has the reason"
    if any("scheduled" in each.message for each in overviews):
        return "the cluster has no room for its replicas; `tandem serve status` on the server says what is missing"
    return "its replicas are starting" if counts.get("STARTING") else "it is being started"


async def ask_why(application: str) -> str | None:
    """Ask Serve's controller for the reason; one that does not answer is a reason as well."""
    from ray import serve as ray_serve

    try:
        status = await asyncio.wait_for(asyncio.to_thread(ray_serve.status), STATUS_TIMEOUT_S)
    except Exception:  # whatever keeps Serve from answering, the client gets an answer
        return "Ray Serve's controller does not answer"
    return why_none(status.applications.get(application))
