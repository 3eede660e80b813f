"""The replicas of one model as one gateway reaches them, and the calls that wait for one with room.

    pool.heard(states)                          # what replicas told of themselves: new ones are connected to at once
    async with pool.seat(call) as seat: …       # waits, in order, until a replica has room

A connection that lives is the truth: a replica whose connection has ended is out at once, whatever was told of it, and
one that is silent or leaves gets nothing new. Waiting costs nothing but memory: whatever changes lets the next ones go.
How many may wait is bounded in front of this, where requests take turns (serve/fair): what is here has had its turn, a
request for many texts with all of them.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from serve.channel.client import Link, connect
from serve.channel.handshake import Denied
from serve.routing.choose import Candidate, Chooser
from serve.wire import ReplicaState

logger = logging.getLogger(__name__)
WINDOW = 2.0
"""Calls at a replica for each of its slots, of all gateways: the next is at hand when a slot frees. Requests keep to
fewer (serve/deploy/access.py); this bounds a request for more texts than those."""
REFUSED_S = 0.3
"""How long a replica that sent a call back as too much gets no other, unless it tells of its load before."""
FIRST_RETRY_S, LONGEST_RETRY_S = 0.2, 2.0
ANY: frozenset[str] = frozenset()


class NoReplica(Exception):
    """There is no replica that could take the call, and it is not worth waiting longer; the message says why."""


class Full(Exception):
    """There are replicas, and none has had room for so long."""


class VersionGone(Exception):
    """No replica of the version and settings that the call must go to is left."""


@dataclass
class Member:
    """One replica that is connected."""

    link: Link
    version: str
    build: str
    own: int = 0
    """Calls of this gateway that it has, or is about to get."""
    refused_until: float = 0.0

    @property
    def usable(self) -> bool:
        """Whether it may get calls at all."""
        return not (self.link.lost or self.link.leaving) and self.link.responsive

    @property
    def has_room(self) -> bool:
        """Whether it may get one more now."""
        full = self.own + self.link.others >= window(self.link.slots)
        return not full and time.monotonic() >= self.refused_until

    def candidate(self) -> Candidate:
        """Return what the chooser is shown of it."""
        link = self.link
        return Candidate(link.replica_id, self.version, link.slots, self.own, link.others)


@dataclass
class Seat:
    """The room that one call has at a replica."""

    pool: Pool
    member: Member
    held: bool = True

    def release(self) -> None:
        """Give the room back: the replica is done with the call. A second time does nothing."""
        if self.held:
            self.held = False
            self.member.own -= 1
            self.pool.changed()


@dataclass
class Waiting:
    """A call that waits for a replica."""

    call: Any
    excluded: frozenset[str]
    build: str | None
    granted: asyncio.Future[Member]
    timer: asyncio.TimerHandle | None = None
    """Ends its patience."""
    since: float = field(default_factory=time.monotonic)

    @property
    def goes_on(self) -> bool:
        """Whether its client has the beginning of the answer: it is not to be sent away, and goes first."""
        return self.build is not None

    def suiting(self, members: Iterable[Member]) -> list[Member]:
        """Return the usable replicas that it may go to; one that it was lost with only where that is all there is."""
        known = [each for each in members if each.usable and self.build in (None, each.build)]
        return [each for each in known if each.link.replica_id not in self.excluded] or known


class Pool:
    """The replicas of one model. Its methods are called on one event loop."""

    def __init__(self, model: str, secret: bytes, chooser: Chooser, patience_s: float) -> None:
        """`patience_s`: how long a call waits for room where no other gets any either."""
        self._last_seen = self._last_granted = time.monotonic()
        self._model, self._secret, self._chooser, self._patience_s = model, secret, chooser, patience_s
        self._members: dict[str, Member] = {}
        self._reported: dict[str, ReplicaState] = {}
        self._connecting: dict[str, asyncio.Task[None]] = {}
        self._retry_at: dict[str, tuple[float, float]] = {}
        self._waiting: dict[int, Waiting] = {}  # in the order of their coming
        self._last_number = 0
        self.start_s: float | None = None
        """How long a replica of this model took to be ready, of those that told last; None where none has told."""

    @property
    def usable(self) -> bool:
        """Whether there is a replica that takes calls, with room or without."""
        return any(member.usable for member in self._members.values())

    @property
    def waiting(self) -> int:
        """Calls that wait."""
        return len(self._waiting)

    # -- calls -------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def seat(
        self, call: Any, excluded: frozenset[str] = ANY, build: str | None = None, patience_s: float | None = None
    ) -> AsyncIterator[Seat]:
        """Wait for a replica that has room for the call, in turn, and hold the room.

        Args:
            excluded: replicas that it must not be while there is another: it was lost with them.
            build: what it must be a replica of (`Identity.build`), since an answer of it has begun; None: any.
            patience_s: how long it may wait, where that is less than the pool's. A call that may go anywhere waits on
                while those before it get room: its turn comes.

        Raises:
            NoReplica, Full, VersionGone: see them.
        """
        patience_s = self._patience_s if patience_s is None else patience_s
        seat = Seat(self, await self._granted(call, excluded, build, patience_s))
        try:
            yield seat
        finally:
            seat.release()

    def refused(self, member: Member) -> None:
        """Take note that a replica sent a call back as too much."""
        member.refused_until = time.monotonic() + REFUSED_S
        asyncio.get_running_loop().call_later(REFUSED_S, self.changed)

    def overdue(self, longer_than_s: float) -> bool:
        """Whether there are calls that have waited for so long while there was no replica."""
        return any(True for _ in self._overdue(longer_than_s))

    def give_up(self, longer_than_s: float, why: str) -> None:
        """Refuse those calls."""
        for waiting in list(self._overdue(longer_than_s)):
            _fail(waiting, NoReplica(why))

    def _overdue(self, longer_than_s: float) -> Iterator[Waiting]:
        now = time.monotonic()
        return (each for each in self._waiting.values() if now - max(each.since, self._last_seen) >= longer_than_s)

    async def _granted(self, call: Any, excluded: frozenset[str], build: str | None, patience_s: float) -> Member:
        loop = asyncio.get_running_loop()
        waiting = Waiting(call, excluded, build, loop.create_future())
        self._last_number += 1
        number = self._last_number
        self._waiting[number] = waiting
        if waiting.goes_on:
            self._waiting = {number: waiting, **self._waiting}
        waiting.timer = loop.call_later(patience_s, self._end_patience, waiting, patience_s)
        try:
            self._let_through()
            return await waiting.granted
        except asyncio.CancelledError:
            granted = waiting.granted
            if granted.done() and not granted.cancelled() and granted.exception() is None:
                Seat(self, granted.result()).release()  # it was let through in the moment that its client left
            raise
        finally:
            if waiting.timer is not None:
                waiting.timer.cancel()
            self._waiting.pop(number, None)

    def _end_patience(self, waiting: Waiting, patience_s: float) -> None:
        left_s = self._last_granted + patience_s - time.monotonic()
        if left_s > 0 and self.usable and not (waiting.build or waiting.excluded):
            waiting.timer = asyncio.get_running_loop().call_later(left_s, self._end_patience, waiting, patience_s)
            return
        said = f"within {patience_s:g} s"
        _fail(waiting, Full(f"none had room {said}") if self.usable else NoReplica(f"none was there {said}"))

    def changed(self) -> None:
        """Forget the replicas that are lost, and let calls through where there is room."""
        lost = [replica_id for replica_id, member in self._members.items() if member.link.lost]
        for replica_id in lost:
            del self._members[replica_id]
        self._let_through()

    def _let_through(self) -> None:
        if self.usable:
            self._last_seen = time.monotonic()
        for number, waiting in list(self._waiting.items()):
            if waiting.granted.done():
                continue
            ready = [member for member in self._members.values() if member.usable and member.has_room]
            suiting = waiting.suiting(self._members.values())
            fitting = {member.link.replica_id: member for member in suiting if member.has_room}
            if fitting:
                shown = [member.candidate() for member in fitting.values()]
                member = fitting[self._chooser.choose(self._model, waiting.call, shown).replica_id]
                member.own += 1
                self._last_granted = time.monotonic()
                waiting.granted.set_result(member)
                del self._waiting[number]
            elif self._is_gone(waiting.build):
                _fail(waiting, VersionGone("no replica of its version and settings is left"))
            elif not ready and not any(each.goes_on for each in self._waiting.values()):
                return

    def _is_gone(self, build: str | None) -> bool:
        """Whether there are replicas that take calls, but none of this build, and none of it may come (back)."""
        if build is None or not self.usable:
            return False
        known = {member.build for member in self._members.values() if not member.link.leaving}
        return build not in known | {state.build for state in self._reported.values() if not state.leaving}

    # -- replicas ----------------------------------------------------------------------------------------------------

    def heard(self, states: Iterable[ReplicaState]) -> None:
        """Take what the model's replicas told of themselves, and connect to those that are new."""
        self._reported = {state.replica_id: state for state in states}
        self.start_s = max((state.start_s for state in self._reported.values()), default=None) or self.start_s
        self._retry_at = {known: retry for known, retry in self._retry_at.items() if known in self._reported}
        now = time.monotonic()
        for replica_id, state in self._reported.items():
            known = replica_id in self._members or replica_id in self._connecting
            due = now >= self._retry_at.get(replica_id, (0.0, 0.0))[0]
            if state.address and not state.leaving and not known and due:
                self._connecting[replica_id] = asyncio.create_task(self._connect(state))
        self.changed()

    async def close(self) -> None:
        """End every connection."""
        tasks = list(self._connecting.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for member in list(self._members.values()):
            member.link.close()

    async def _connect(self, state: ReplicaState) -> None:
        replica_id = state.replica_id
        try:
            link = await connect(state.address, self._secret, replica_id, self.changed)
        except (OSError, Denied, ValueError) as error:
            self._try_later(replica_id, state.address, error)
        else:
            self._retry_at.pop(replica_id, None)
            self._members[replica_id] = Member(link, state.version, state.build)
        finally:
            del self._connecting[replica_id]
        self.changed()

    def _try_later(self, replica_id: str, address: str, error: Exception) -> None:
        _, before_s = self._retry_at.get(replica_id, (0.0, 0.0))
        delay_s = min(LONGEST_RETRY_S, 2 * before_s or FIRST_RETRY_S)
        if not before_s or isinstance(error, Denied):
            logger.warning("replica %s of %s at %s cannot be used: %s", replica_id, self._model, address, error)
        self._retry_at[replica_id] = (time.monotonic() + delay_s, delay_s)


def window(slots: int) -> int:
    """Return how many calls a replica may have, of all gateways."""
    return math.ceil(WINDOW * slots)


def _fail(waiting: Waiting, error: Exception) -> None:
    if not waiting.granted.done():
        waiting.granted.set_exception(error)
