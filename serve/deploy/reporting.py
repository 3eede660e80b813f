"""How gateways and replicas reach the state actor: a `Reporter` tells one sender's state, a `Reader` reads everyone's.

Both look the actor up anew where it has moved or is gone, and go on meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from serve.deploy import state_actor, succession
from serve.deploy.shapes import Stranger, seal, unseal
from serve.deploy.state_actor import ASK_TIMEOUT_S, FRESH_S, SHAPE
from serve.deploy.succession import Moved

logger = logging.getLogger(__name__)
REPORT_INTERVAL_S = 0.5
SOON_S = 0.05
"""How soon after a report the next one may be."""


class Reporter:
    """Keeps one sender's report with the state actor fresh, from `start` to `stop`."""

    def __init__(self, name: str, sender: str, state: Callable[[], Any]) -> None:
        self._name = name
        self._sender = sender
        self._state = state
        self._actor: Any = None
        self._sent: Any = None
        """The answer to the last report, which may not be there yet."""
        self._failing = self._is_strange = False
        self._asked = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
        self.tell()  # the last counts of one that leaves are kept
        if self._actor is not None:
            self._actor.leave.remote(self._sender)

    def tell(self) -> None:
        """Tell how it is now, before it is due. What fails is for the log: the next report may succeed."""
        if self._actor is None:
            return
        try:
            self._sent = self._actor.report.remote(self._sender, SHAPE, seal(self._state()))
            self._failing = False
        except Exception:  # of whatever the state is made of, the user's own engine among it, and of Ray
            self._failed()

    def soon(self) -> None:
        """Report at once, and not only when it is time: somebody waits for a replica that is not there."""
        self._asked.set()

    async def _run(self) -> None:
        while True:
            await self._find()
            self.tell()
            if await self._must_tell_again():
                continue
            await asyncio.sleep(SOON_S)  # however many ask
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._asked.wait(), REPORT_INTERVAL_S - SOON_S)
            self._asked.clear()

    async def _find(self) -> None:
        if self._actor is None:
            try:
                self._actor = await asyncio.to_thread(state_actor.find, self._name)  # it blocks where Ray is in trouble
            except Exception:  # a cluster in trouble
                self._failed()

    async def _must_tell_again(self) -> bool:
        """Look how the last report was taken; tell whether another actor is to get it at once."""
        from ray.exceptions import RayError

        sent, self._sent = self._sent, None
        if sent is None:
            return False
        try:
            answer = await asyncio.wait_for(sent, ASK_TIMEOUT_S)
        except asyncio.TimeoutError:  # it is slow, and the next report may be in time
            return False
        except RayError as error:
            logger.info("the state actor is gone (%s): it is looked for", type(error).__name__)
            self._actor = None
            return False
        self._note_strange(isinstance(answer, Stranger))
        if isinstance(answer, Moved):
            self._actor = await asyncio.to_thread(succession.named, answer.to)
        return isinstance(answer, Moved) and self._actor is not None

    def _note_strange(self, is_strange: bool) -> None:
        if is_strange and not self._is_strange:
            logger.warning(
                "the state actor is of another version of Tandem and does not know the shape of what %s tells (%s): "
                "scaling does not count it until `tandem serve up` has replaced one of them",
                *(self._sender, SHAPE),
            )
        self._is_strange = is_strange

    def _failed(self) -> None:
        if not self._failing:  # once, and not twice a second
            logger.exception("%s cannot tell how it is; it goes on trying", self._sender)
        self._failing = True


class Reader:
    """Reads the state actor of one endpoint: however many ask, it is asked as often as replicas tell."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._actor: Any = None
        self._last: list[Any] = []
        self._read_at = -math.inf
        self._asking: asyncio.Task[None] | None = None

    async def read(self) -> list[Any]:
        """Return the fresh reports; an actor that is slow to answer is quoted from the last time, while fresh."""
        if self._asking is None and time.monotonic() - self._read_at >= REPORT_INTERVAL_S / 2:
            self._asking = asyncio.get_running_loop().create_task(self._ask())
        if self._asking is not None:
            await asyncio.shield(self._asking)  # one of those that wait may leave
        return self._last if time.monotonic() - self._read_at < FRESH_S else []

    async def _ask(self) -> None:
        from ray.exceptions import RayError

        try:  # finding blocks while Ray is in trouble
            self._actor = self._actor or await asyncio.to_thread(state_actor.find, self._name)
            told = await self._told()
            if isinstance(told, Moved):
                self._actor = await asyncio.to_thread(succession.named, told.to)
                told = await self._told()
            if self._actor is not None and not isinstance(told, Moved):
                self._last = [unseal(each) for each in told]
                self._read_at = time.monotonic()
        except (RayError, asyncio.TimeoutError):
            self._actor = None
        finally:
            self._asking = None

    async def _told(self) -> list[bytes] | Moved:
        if self._actor is None:
            return []
        told: list[bytes] | Moved = await asyncio.wait_for(self._actor.read.remote(SHAPE), ASK_TIMEOUT_S)
        return told
