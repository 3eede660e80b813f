"""A request waits for a replica while one may come, and no longer than the bound; then it is a 503 with the reason."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from ray.serve.schema import (
    ApplicationStatus,
    ApplicationStatusOverview,
    DeploymentStatus,
    DeploymentStatusOverview,
    DeploymentStatusTrigger,
)
from ray.serve.schema import ReplicaState as State

from serve.api.body import ApiError
from serve.deploy import readiness


def saying(value: Any) -> Callable[[], Awaitable[Any]]:
    async def say() -> Any:
        return value

    return say


async def asked(answer: Awaitable[Any], has_replica: bool, reason: str | None, wait_s: float = 0.02) -> Any:
    return await readiness.bounded(answer, "m", saying(has_replica), saying(reason), wait_s, check_s=0.005)


def test_an_answer_passes() -> None:
    assert asyncio.run(asked(asyncio.sleep(0.01, "text"), False, "none", wait_s=5)) == "text"


def test_without_a_replica_it_is_a_503_with_reason_and_retry_after_and_the_request_ends() -> None:
    async def run() -> tuple[ApiError, bool]:
        task = asyncio.ensure_future(asyncio.sleep(60))
        with pytest.raises(ApiError) as refused:
            await asked(task, False, "its replicas are starting")
        await asyncio.sleep(0)
        return refused.value, task.cancelled()

    error, is_cancelled = asyncio.run(run())
    assert (error.status, error.headers) == (503, {"retry-after": "10"})
    assert error.message == "'m' has no replica that is ready: its replicas are starting"
    assert is_cancelled


@pytest.mark.parametrize(("has_replica", "reason"), [(True, "none"), (False, None)])
def test_behind_a_replica_that_runs_it_waits_for_its_turn(has_replica: bool, reason: str | None) -> None:
    """None: the controller knows a replica that has not told of itself."""
    assert asyncio.run(asked(asyncio.sleep(0.08, "late"), has_replica, reason)) == "late"


def test_a_failure_passes_and_the_end_of_a_stream() -> None:
    async def failing(error: Exception) -> None:
        raise error

    for error in (ValueError("x"), StopAsyncIteration()):
        with pytest.raises(type(error)):
            asyncio.run(asked(failing(error), True, None))


def test_a_client_that_goes_away_ends_the_request() -> None:
    async def run() -> bool:
        task = asyncio.ensure_future(asyncio.sleep(60))
        waiting = asyncio.ensure_future(asked(task, True, None))
        await asyncio.sleep(0.02)
        waiting.cancel()
        await asyncio.wait({waiting, task}, timeout=5)
        return task.cancelled()

    assert asyncio.run(run())


def overview(
    states: dict[State, int], message: str = "", status: DeploymentStatus = DeploymentStatus.UPDATING
) -> ApplicationStatusOverview:
    deployment = DeploymentStatusOverview(status, DeploymentStatusTrigger.UNSPECIFIED, states, message)
    return ApplicationStatusOverview(ApplicationStatus.DEPLOYING, "", 0.0, {"engine": deployment})


@pytest.mark.parametrize(
    ("application", "said"),
    [
        (None, "not deployed"),
        (overview({State.STARTING: 1}), "are starting"),
        (overview({}), "being started"),
        (overview({State.STARTING: 1}, "Deployment 'engine' in application 't.m' has 1 replicas that have taken more "
                  "than 30s to be scheduled."), "no room"),
        (overview({}, "The deployment failed to start 3 times in a row.\n  File \"/secret/x.py\"",
                  DeploymentStatus.DEPLOY_FAILED), "fail while they start"),
    ],
)  # fmt: skip
def test_the_reason_tells_no_paths(application: ApplicationStatusOverview | None, said: str) -> None:
    why = readiness.why_none(application)
    assert why is not None
    assert said in why
    assert "/secret" not in why


def test_one_that_runs_needs_no_reason() -> None:
    assert readiness.why_none(overview({State.RUNNING: 1, State.STARTING: 1})) is None
