"""Many that ask for the state at once ask the actor once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from serve.deploy import state_actor
from serve.deploy.reporting import REPORT_INTERVAL_S, Reader
from serve.deploy.shapes import seal
from serve.deploy.state_actor import SHAPE, StateActor


class Handle:
    """The real actor's object behind what a handle looks like; Ray is not needed to count its calls."""

    def __init__(self) -> None:
        self.actor, self.asked = StateActor(), 0
        self.actor.report("r", SHAPE, seal("well"))
        self.read = self

    async def _answer(self) -> list[Any]:
        await asyncio.sleep(0.01)
        return self.actor.read(SHAPE)

    def remote(self, shape: str) -> Any:
        assert shape == SHAPE
        self.asked += 1
        return self._answer()


@pytest.fixture
def handle(monkeypatch: pytest.MonkeyPatch) -> Handle:
    found = Handle()
    monkeypatch.setattr(state_actor, "find", lambda name: found)
    return found


def test_a_thousand_at_once_ask_once(handle: Handle) -> None:
    async def many() -> list[list[Any]]:
        reader = Reader("x")
        return await asyncio.gather(*(reader.read() for _ in range(1000)))

    assert asyncio.run(many()) == [["well"]] * 1000
    assert handle.asked == 1


def test_one_that_leaves_does_not_stop_the_others(handle: Handle) -> None:
    async def some() -> list[Any]:
        reader = Reader("x")
        leaver, stayer = asyncio.create_task(reader.read()), asyncio.create_task(reader.read())
        await asyncio.sleep(0.001)
        leaver.cancel()
        return await stayer

    assert asyncio.run(some()) == ["well"]


def test_it_is_asked_again_when_replicas_have_told_again(handle: Handle) -> None:
    async def later() -> None:
        reader = Reader("x")
        await reader.read()
        await asyncio.sleep(REPORT_INTERVAL_S / 2 + 0.01)
        await reader.read()

    asyncio.run(later())
    assert handle.asked == 2
