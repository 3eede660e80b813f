"""The state actor: what another version tells stays sealed, and one that runs newer code goes on from what it knew."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from serve.deploy import reporting, state_actor, succession
from serve.deploy.reporting import Reader, Reporter
from serve.deploy.shapes import Stranger, seal, unseal
from serve.deploy.state_actor import SHAPE, StateActor
from serve.deploy.succession import Generation, Moved
from serve.metrics.departed import LeftGateway
from serve.wire import GatewayState, Load, ReplicaState
from tests.support.handles import Handle
from tests.support.waiting import until

REPLICA = ReplicaState("m", "r", "1", Load(1, 0, 0.0), {})
GATEWAY = GatewayState({}, metrics={"gateway": "g", "packed": b""})
OTHER = "of another version"


def told(actor: StateActor, shape: str = SHAPE) -> list[Any]:
    answer = actor.read(shape)
    assert isinstance(answer, list)
    return [unseal(each) for each in answer]


def test_reports_of_another_shape_stay_sealed_and_go_to_those_that_know_it(caplog: pytest.LogCaptureFixture) -> None:
    actor = StateActor()
    assert actor.report("own", SHAPE, seal(REPLICA)) is None
    with caplog.at_level(logging.WARNING, "serve"):
        for _ in range(3):
            assert actor.report("other", OTHER, b"no pickle of ours") == Stranger(SHAPE)
    assert [record.message.split(" tells")[0] for record in caplog.records] == ["other"], "said once"
    assert told(actor) == [REPLICA]
    assert actor.read(OTHER) == [b"no pickle of ours"]


def test_a_successor_knows_the_reports_and_those_that_have_left(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        before, after = StateActor(version="old"), StateActor(version="new")
        before.report("r", SHAPE, seal(REPLICA))
        before.report("g", SHAPE, seal(GATEWAY))
        before.report("other", OTHER, b"sealed")
        before.leave("g")
        fresher = ReplicaState("m", "r", "1", Load(5, 0, 0.0), {})
        after.report("r", SHAPE, seal(fresher))  # it has told the successor already
        assert await after.take_over(Handle(before), "state:x#2")
        assert told(after) == [fresher, LeftGateway(GATEWAY.metrics)]
        assert after.read(OTHER) == [b"sealed"]
        assert before.report("r", SHAPE, seal(REPLICA)) == before.read(SHAPE) == Moved("state:x#2")
        assert (before.generation(), after.generation()) == (Generation("old", True), Generation("new"))

    asyncio.run(scenario())


def test_what_cannot_be_read_of_a_predecessor_is_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    class Odd(StateActor):
        async def hand_over(self, to: str) -> dict[str, Any]:
            return {**await super().hand_over(to), "format": 99}

    async def scenario() -> None:
        before, after = Odd(), StateActor()
        before.report("r", SHAPE, seal(REPLICA))
        assert not await after.take_over(Handle(before), "state:x#2")
        assert told(after) == []

    asyncio.run(scenario())
    assert "another format" in caplog.text


class Cluster:
    """The actors by name, as Ray would find them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.actors = {"state:x": Handle(StateActor(version="old"))}
        monkeypatch.setattr(succession, "named", self.actors.get)
        monkeypatch.setattr(reporting, "SOON_S", 0.001)
        monkeypatch.setattr(reporting, "REPORT_INTERVAL_S", 0.002)

    def succeed(self) -> StateActor:
        self.actors["state:x#2"] = Handle(StateActor(version="new"))
        successor: StateActor = self.actors["state:x#2"].actor
        return successor

    def end_first(self) -> None:
        self.actors.pop("state:x").lives = False


def with_cluster(monkeypatch: pytest.MonkeyPatch, scenario: Callable[[Cluster, Reporter], Awaitable[None]]) -> None:
    async def inside() -> None:
        cluster = Cluster(monkeypatch)
        reporter = Reporter("x", "r", lambda: REPLICA)
        reporter.start()
        try:
            await scenario(cluster, reporter)
        finally:
            reporter.stop()

    asyncio.run(inside())


@pytest.mark.parametrize("is_killed", [False, True], ids=["has moved", "is gone"])
def test_senders_and_readers_follow_an_actor_that(monkeypatch: pytest.MonkeyPatch, is_killed: bool) -> None:
    async def scenario(cluster: Cluster, reporter: Reporter) -> None:
        reader, first = Reader("x"), cluster.actors["state:x"].actor
        await until(lambda: told(first) == [REPLICA])
        assert await reader.read() == [REPLICA]
        second = cluster.succeed()
        if not is_killed:
            await first.hand_over("state:x#2")
        else:
            cluster.end_first()
        await until(lambda: told(second) == [REPLICA])
        second.report("other", SHAPE, seal(GATEWAY))
        seen: list[Any] = []
        while seen != [REPLICA, GATEWAY]:
            seen = await reader.read()
            assert seen in ([REPLICA], [REPLICA, GATEWAY]), "nothing is missing in between"
            await asyncio.sleep(0.002)

    with_cluster(monkeypatch, scenario)


def test_a_sender_says_once_that_the_actor_does_not_know_its_shape(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(cluster: Cluster, reporter: Reporter) -> None:
        first = cluster.actors["state:x"].actor
        await until(lambda: first.read(OTHER) != [])
        await asyncio.sleep(0.02)
        assert told(first) == []

    monkeypatch.setattr(reporting, "SHAPE", OTHER)
    with caplog.at_level(logging.WARNING, "serve"):
        with_cluster(monkeypatch, scenario)
    said = [record.message for record in caplog.records if record.name == reporting.__name__]
    assert len(said) == 1
    assert "does not know the shape" in said[0]
    assert state_actor.SHAPE != OTHER
