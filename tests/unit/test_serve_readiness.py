"""A request waits for a replica while one may come, and no longer than the bound; then it is a 503 with its reason."""

from __future__ import annotations

import asyncio
import threading

import pytest
from ray import serve as ray_serve
from ray.serve.schema import (
    ApplicationStatus,
    ApplicationStatusOverview,
    DeploymentStatus,
    DeploymentStatusOverview,
    DeploymentStatusTrigger,
    ServeStatus,
)
from ray.serve.schema import ReplicaState as State

from serve.deploy import readiness
from serve.deploy.readiness import Why
from tests.support.waiting import until


class Waits:
    """Calls that have waited too long, until they are refused."""

    def __init__(self, usable: bool = False) -> None:
        self.usable = usable
        self.refused_with: str | None = None

    def overdue(self, longer_than_s: float) -> bool:
        return self.refused_with is None

    def give_up(self, longer_than_s: float, why: str) -> None:
        self.refused_with = why


def watched(waits: Waits, *reasons: Why, hopeless_s: float = 0.0) -> list[Why]:
    """Watch for a moment; return the reasons that were not asked for."""
    left = list(reasons)

    async def reason() -> Why:
        return left.pop(0) if left else Why("starting", True)

    async def run() -> None:
        watching = asyncio.create_task(readiness.watch(waits, reason, 1, 0.002, hopeless_s))
        await (asyncio.sleep(0.2) if waits.usable else until(lambda: not left))
        await asyncio.sleep(0.005)
        watching.cancel()

    asyncio.run(run())
    return left


def test_without_hope_calls_are_refused_with_the_reason() -> None:
    waits = Waits()
    assert watched(waits, Why("no room", hopeful=False)) == []
    assert waits.refused_with == "no room"


def test_while_one_is_on_its_way_they_wait() -> None:
    waits = Waits()
    assert watched(waits, Why("starting", True), Why("starting", True), Why("it fails", False)) == []
    assert waits.refused_with == "it fails"


def test_a_moment_without_hope_between_one_that_goes_and_one_that_comes_refuses_nobody() -> None:
    waits, gap = Waits(), [Why("no room", False)] * 2
    leaving, starting = Why("no room", True), Why("starting", True)
    assert watched(waits, leaving, *gap, starting, *gap, starting, hopeless_s=60) == []
    assert waits.refused_with is None


def test_with_a_replica_nobody_is_asked() -> None:
    waits = Waits(usable=True)
    assert len(watched(waits, Why("none", False))) == 1
    assert waits.refused_with is None


def test_the_answer_is_a_503_with_retry_after() -> None:
    error = readiness.unavailable("m", "its replicas are starting")
    assert (error.status, error.code, error.headers) == (503, "not_ready", {"retry-after": "10"})
    assert error.message == "'m' has no replica that is ready: its replicas are starting"


def overview(
    states: dict[State, int], message: str = "", status: DeploymentStatus = DeploymentStatus.UPDATING
) -> ApplicationStatusOverview:
    deployment = DeploymentStatusOverview(status, DeploymentStatusTrigger.UNSPECIFIED, states, message)
    return ApplicationStatusOverview(ApplicationStatus.DEPLOYING, "", 0.0, {"engine": deployment})


@pytest.mark.parametrize(
    ("application", "said", "hopeful"),
    [
        (None, "not deployed", False),
        (overview({State.STARTING: 1}), "are starting", True),
        (overview({State.STOPPING: 1}), "being started", True),
        (overview({}), "being started", True),
        (overview({}, "1 replicas that have taken more than 30s to be scheduled."), "no room", False),
        (overview({State.STOPPING: 1}, "1 replicas that have taken more than 30s to be scheduled."), "no room", True),
        (overview({}, "The deployment failed to start 3 times in a row.\n  File \"/secret/x.py\"",
                  DeploymentStatus.DEPLOY_FAILED), "fail while they start", False),
        (overview({State.RUNNING: 1, State.STARTING: 1}), "do not answer", True),
    ],
)  # fmt: skip
def test_the_reason_tells_no_paths_and_whether_waiting_is_worth_it(
    application: ApplicationStatusOverview | None, said: str, hopeful: bool
) -> None:
    why = readiness.why_none(application)
    assert said in why.reason
    assert why.hopeful == hopeful
    assert "/secret" not in why.reason


def test_a_replica_that_has_found_room_is_waited_for_whatever_was_said_before() -> None:
    """Serve's message stays when a replica that had waited for room has it."""
    waited = overview({State.STARTING: 1}, "1 replicas that have taken more than 30s to be scheduled.")
    starting = {"state": "STARTING", "node_id": None}
    details = {"deployments": {"engine": {"replicas": [starting, {"state": "STOPPING", "node_id": "n"}]}}}
    assert not readiness.why_none(waited, readiness.count_placed(details)).hopeful
    starting["node_id"] = "n"
    assert readiness.why_none(waited, readiness.count_placed(details)) == Why("its replicas are starting", True)


def test_one_that_is_deployed_and_scaled_to_nothing_is_no_hope() -> None:
    deployed = overview({})
    deployed.status = ApplicationStatus.RUNNING
    assert not readiness.why_none(deployed).hopeful


def test_a_controller_that_hangs_is_asked_once_at_a_time_and_holds_up_no_other_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    goes_on, asked = threading.Event(), []

    def status() -> ServeStatus:
        asked.append(threading.current_thread())
        goes_on.wait(10)
        return ServeStatus(applications={})

    monkeypatch.setattr(ray_serve, "status", status)
    monkeypatch.setattr(readiness, "STATUS_TIMEOUT_S", 0.02)

    async def scenario() -> None:
        silent = Why("Ray Serve's controller does not answer", hopeful=False)
        for _ in range(2):
            assert set(await asyncio.gather(*(readiness.ask_why("m") for _ in range(100)))) == {silent}
        await asyncio.wait_for(asyncio.to_thread(str), 5)
        assert len(asked) == 1
        goes_on.set()
        asked[0].join(5)
        assert (await readiness.ask_why("m")).reason == "it is not deployed"
        assert len(asked) == 2

    asyncio.run(scenario())


def test_a_controller_that_fails_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [RuntimeError("dead"), ServeStatus(applications={})]

    def status() -> ServeStatus:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(ray_serve, "status", status)
    reasons = [asyncio.run(readiness.ask_why("m")).reason for _ in range(2)]
    assert reasons == ["Ray Serve's controller does not answer", "it is not deployed"]
