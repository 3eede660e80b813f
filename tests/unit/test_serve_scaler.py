"""The loop that scales, against a Serve that answers as the test wants: it hangs, is updated, is set by others."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from serve.deploy.scaler import Pace, Scaler, seen
from serve.scaling.decider import Plan
from serve.scaling.decisions import GATEWAY_ROW
from serve.scaling.steps import Bounds
from serve.wire import GatewayState, Load, ReplicaState, Work
from tests.support.waiting import until

QUICK = Pace(look=0.002, refresh=0.02, idle_refresh=0.05, retry=0.005, answer=0.05)


class Serve:
    """What Ray Serve's controller tells, and what it was asked to do."""

    def __init__(self, least: int = 1, most: int = 3, target: int = 1) -> None:
        self.target, self.status, self.hangs = target, "HEALTHY", False
        self.plans = {"m": Plan(Bounds(least, most, hold_s=0.05), "1").as_config()}
        self.set: list[int] = []

    async def details(self) -> dict[str, Any]:
        if self.hangs:
            await asyncio.sleep(60)
        gateway = {"deployment_config": {"user_config": {"scaling": self.plans}}, **_aim(1, "HEALTHY")}
        engine = _aim(self.target, self.status)
        return {
            "applications": {"x": {"deployments": {"gateway": gateway}}, "x.m": {"deployments": {"engine": engine}}}
        }

    async def set_replicas(self, application: str, deployment: str, count: int) -> None:
        assert (application, deployment) == ("x.m", "engine")
        self.target = count
        self.set.append(count)


def _aim(count: int, status: str) -> dict[str, Any]:
    return {"target_num_replicas": count, "status": status}


BUSY = {"g": GatewayState({"m": 9}, {"m": Work(0, 0, 90, 10)}), "r": ReplicaState("m", "r", "1", Load(1, 0, 0.0), {})}
QUIET = {"g": GatewayState({}, {}), "r": ReplicaState("m", "r", "1", Load(0, 0, 0.0), {})}


def run(serve: Serve, scenario: Callable[[Scaler, dict[str, Any]], Awaitable[None]]) -> None:
    async def inside() -> None:
        reports: dict[str, Any] = {}
        scaler = Scaler("x", lambda: reports, serve, QUICK)
        scaler.start()
        try:
            await scenario(scaler, reports)
        finally:
            await scaler.stop()

    asyncio.run(inside())


def test_load_adds_and_quiet_removes() -> None:
    serve = Serve()

    async def scenario(scaler: Scaler, reports: dict[str, Any]) -> None:
        reports.update(BUSY)
        await until(lambda: serve.target == 2)
        reports.update(QUIET)
        await until(lambda: serve.target == 1)
        standing = scaler.state().standings["m"]
        assert [change.after for change in standing.changes] == serve.set == [2, 1]
        assert standing.refused == ""
        serve.plans = {}
        scaler.ask_anew()
        await until(lambda: scaler.state().standings == {})

    run(serve, scenario)


def test_an_update_is_left_alone_until_it_is_done() -> None:
    serve = Serve()
    serve.status = "UPDATING"

    async def scenario(scaler: Scaler, reports: dict[str, Any]) -> None:
        reports.update(BUSY)
        await until(lambda: bool((found := scaler.state().standings) and found["m"].refused))
        await asyncio.sleep(0.03)
        assert serve.set == []
        assert "serve up" in scaler.state().standings["m"].refused
        serve.status = "HEALTHY"
        await until(lambda: serve.set == [2])
        assert scaler.state().standings["m"].refused == ""

    run(serve, scenario)


def test_looks_go_on_while_the_controller_hangs_and_what_was_decided_is_set_later() -> None:
    serve = Serve()

    async def scenario(scaler: Scaler, reports: dict[str, Any]) -> None:
        reports.update(QUIET)
        await until(lambda: "m" in scaler.state().standings)
        serve.hangs = True
        reports.update(BUSY)
        await until(lambda: scaler.state().standings["m"].wanted == 2)
        await until(lambda: "does not answer" in scaler.state().standings["m"].refused)
        assert serve.set == []
        serve.hangs = False
        await until(lambda: serve.set == [2])

    run(serve, scenario)


def test_a_request_at_zero_is_looked_at_when_it_is_heard_of() -> None:
    serve = Serve(least=0, target=0)
    slow = QUICK._replace(look=3600.0)

    async def scenario() -> None:
        reports: dict[str, Any] = {}
        scaler = Scaler("x", lambda: reports, serve, slow)
        scaler.heard(GatewayState({}, scales=True))
        for _ in range(3):
            scaler._wake.set()  # the first looks, which an hour's pace leaves out
            await asyncio.sleep(0.01)
        reports["g"] = GatewayState({"m": 1}, {"m": Work(9, 0, 9, 0)}, scales=True)
        scaler.heard(reports["g"])
        await until(lambda: serve.set == [1])
        await scaler.stop()

    asyncio.run(scenario())


def test_what_the_spec_fixes_is_not_touched() -> None:
    serve = Serve()
    serve.plans = {}

    async def scenario(scaler: Scaler, reports: dict[str, Any]) -> None:
        reports.update(BUSY)
        await asyncio.sleep(0.05)
        assert scaler.state().standings == {}
        assert serve.set == []

    run(serve, scenario)


def test_what_serve_tells_is_read() -> None:
    details = asyncio.run(Serve().details())
    details["applications"]["x"]["deployments"]["gateway"]["deployment_config"]["user_config"]["scaling"] |= {
        GATEWAY_ROW: Plan(Bounds(1, 2), "", requests=64).as_config(),
        "gone": Plan(Bounds(1, 2), "1").as_config(),
    }
    view = seen("x", details)
    assert set(view.plans) == set(view.aims) == {"m", GATEWAY_ROW}
    assert view.plans[GATEWAY_ROW].requests == 64
    assert view.aims["m"] == (1, False)
    assert seen("x", {}) == ({}, {})
