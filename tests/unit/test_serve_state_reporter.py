"""One that tells how it is goes on telling, whatever fails meanwhile, and holds up nothing."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest

from serve.deploy import reporting, state_actor
from serve.deploy.reporting import Reporter
from serve.deploy.shapes import unseal
from tests.support.waiting import until


class Handle:
    """What a handle of the actor looks like; it keeps what was told. The first so many times it is not to be found."""

    def __init__(self, failures: int = 0) -> None:
        self.told: list[Any] = []
        self.left: list[str] = []
        self.found_by: list[threading.Thread] = []
        self.failures = failures
        self.report = self.Method(lambda sender, shape, sealed: self.told.append(unseal(sealed)))
        self.leave = self.Method(self.left.append)

    class Method:
        def __init__(self, call: Callable[..., Any]) -> None:
            self.remote = call

    def find(self, name: str) -> Handle:
        self.found_by.append(threading.current_thread())
        if len(self.found_by) <= self.failures:
            raise RuntimeError("the cluster does not answer")
        return self


def told(monkeypatch: pytest.MonkeyPatch, handle: Handle, state: Callable[[], Any], count: int) -> None:
    """Run a reporter until it has told so often, or a second has passed."""
    monkeypatch.setattr(state_actor, "find", handle.find)
    monkeypatch.setattr(reporting, "SOON_S", 0.001)
    monkeypatch.setattr(reporting, "REPORT_INTERVAL_S", 0.002)

    async def inside() -> None:
        reporter = Reporter("x", "replica-1", state)
        reporter.start()
        await until(lambda: len(handle.told) >= count)
        reporter.stop()

    asyncio.run(inside())
    assert len(handle.told) >= count
    assert handle.left == ["replica-1"]


def test_a_state_that_cannot_be_made_ends_no_reports(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failing = [True, True, False, True, False, False]

    def state() -> str:
        if failing and failing.pop(0):
            raise RuntimeError("of the engine's own")
        return "well"

    with caplog.at_level(logging.ERROR, "serve"):
        told(monkeypatch, Handle(), state, 4)
    assert [record.exc_info is not None for record in caplog.records] == [
        True,
        True,
    ]  # once for each time that it began


def test_an_actor_that_cannot_be_found_is_looked_for_again_and_not_on_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = Handle(failures=3)
    told(monkeypatch, handle, lambda: "well", 2)
    assert len(handle.found_by) == 4
    assert threading.main_thread() not in handle.found_by
