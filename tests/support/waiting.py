"""Waiting for what another task, thread or process does: as long as that takes on a busy machine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

LIMIT_S = 60.0
"""After so long it does not come. No test asserts that something is fast by it."""
EVERY_S = 0.002


async def until(condition: Callable[[], object], otherwise: str = "it did not come to that") -> None:
    """Wait in an event loop until a condition holds; fail with `otherwise` if it never does."""
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, otherwise
        await asyncio.sleep(EVERY_S)


def wait_for(condition: Callable[[], object], otherwise: str = "it did not come to that") -> None:
    """Wait in a thread until a condition holds; fail with `otherwise` if it never does."""
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, otherwise
        time.sleep(EVERY_S)
