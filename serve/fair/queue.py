"""Deficit round-robin over tokens between keys, within priority classes: which waiting request goes next.

M. Shreedhar, G. Varghese, "Efficient Fair Queueing using Deficit Round Robin", SIGCOMM 1995, with one change that
generation needs: what a request costs is known only when it has ended. So a key pays its prompt when its request goes,
and every generated token when it comes (`charge`); its deficit may become negative, and it waits its rounds until it
has earned that back. What is used while nobody waits is free, and when nobody waits any more, nobody owes or is owed.

A round is paid to all keys when none of those that wait may go, and a key with nothing waiting earns it too, and may
save up some: otherwise one with little to do, of which something always runs, would owe ever more and wait behind the
one with much to do. A key with more than a round saved is owed: it goes before the others, as new flows do in
FlowQueue-CoDel (RFC 8290). No round is paid meanwhile, so what goes first is bounded by what was saved, however many
keys come and go.

Pure: the time is an argument, nothing is awaited, and a request is whatever the caller puts in. A push touches one key.
A pop walks at most two rounds of the keys that wait, whatever they owe, and one key a pop when they owe about the same.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

Request = TypeVar("Request")

QUANTUM = 256.0
"""Tokens that a key earns a round: about one short answer. A smaller one is as fair and costs more rounds."""
SAVED = 4 * QUANTUM
"""What a key may have earned and not used, until something else is said (`FairQueue.saved`)."""


class Full(Exception):
    """No more may wait: `whose` is the key's own bound, or that of all together."""

    def __init__(self, whose: Literal["key", "all"], waiting: int) -> None:
        super().__init__(f"{waiting} wait already")
        self.whose, self.waiting = whose, waiting


@dataclass
class Waiting(Generic[Request]):
    """One request in the queue."""

    request: Request
    key: str
    priority: int
    cost: float
    """Tokens that are known now: the prompt's."""
    deadline: float
    weight: int = 1
    """Texts that it asks for."""
    number: int = 0
    """Of all that came to this queue."""
    gone: bool = False
    """It was taken, has expired, or its client has left."""


@dataclass
class _Flow(Generic[Request]):
    """What one key has in one class."""

    waiting: OrderedDict[int, Waiting[Request]] = field(default_factory=OrderedDict)
    """By number, in the order of their coming. Any of them may leave at any time, at the same cost."""
    deficit: float = 0.0
    running: int = 0
    """Texts that were let through and have not ended."""
    weight: int = 0
    """Of what waits, together."""
    round: int = 0
    """The last round that it was paid."""
    period: int = -1
    """The time of its class, without a moment in which nobody waits, that its deficit is of."""

    @property
    def owed(self) -> bool:
        return self.deficit > QUANTUM

    def may_go_first(self, most_running: float) -> bool:
        """Tell whether it is owed and runs fewer texts than that."""
        return self.owed and self.running < most_running


class FairQueue(Generic[Request]):
    """The requests that wait for one model at one gateway. Class 0 is served first, always."""

    def __init__(self, most: int, most_per_key: int, classes: int = 3) -> None:
        self.bound(most, most_per_key)
        self.saved = SAVED
        """Tokens that a key may have earned and not used, and that it begins with when nothing of it runs."""
        self._flows: list[OrderedDict[str, _Flow[Request]]] = [OrderedDict() for _ in range(classes)]
        """By class, the keys that wait, in the order of their turns."""
        self._owed: list[OrderedDict[str, None]] = [OrderedDict() for _ in range(classes)]
        """By class, those of them that were owed when they began to wait, in the order of their turns."""
        self._idle: list[OrderedDict[str, _Flow[Request]]] = [OrderedDict() for _ in range(classes)]
        """By class, the keys with nothing waiting: something of them runs, or they have not earned all they may save.
        The one that has waited last comes last."""
        self._period = [0] * classes
        """By class, how many times nobody waited any more."""
        self._of_class = [0] * classes
        """By class, how many requests wait."""
        self._weight_of_class = [0] * classes
        self._round = [0] * classes
        """By class, how many rounds were paid."""
        self._last_number = 0

    def __len__(self) -> int:
        return sum(self._of_class)

    def bound(self, most: int, most_per_key: int) -> None:
        """Say how many may wait from now on; those that wait already stay."""
        self._most, self._most_per_key = most, most_per_key

    def waiting_of(self, key: str, priority: int) -> int:
        """Return how many requests of a key wait."""
        flow = self._flows[priority].get(key)
        return len(flow.waiting) if flow else 0

    def ahead(self, key: str, priority: int) -> int:
        """Return how many texts go before a request that comes for a key now, where all are about as many tokens.

        That is what waits in better classes, and of its own class a round of all keys for each text of its key.
        """
        flows = self._flows[priority]
        flow = flows.get(key)
        active = len(flows) + (flow is None)
        rounds = ((flow.weight if flow else 0) + 1) * active - 1
        return sum(self._weight_of_class[:priority]) + min(rounds, self._weight_of_class[priority])

    def is_owed(self, key: str, priority: int, most_running: float = math.inf) -> bool:
        """Tell whether a key of which something waits has more than a round saved and runs fewer texts than that."""
        flow = self._flows[priority].get(key)
        return flow is not None and flow.may_go_first(most_running)

    def last_in_line(self, key: str, priority: int) -> Waiting[Request] | None:
        """Return who gives its place in a full queue to a request that comes for a key; None: nobody does.

        The newest of the longest queue in the worst class, unless the key's own would then be as long (longest-queue
        drop: B. Suter et al., "Buffer management schemes for supporting TCP in gigabit routers", 1999).
        """
        worst = max((at for at, count in enumerate(self._of_class) if count), default=-1)
        if worst < priority:
            return None
        longest = max(self._flows[worst].values(), key=lambda flow: len(flow.waiting))
        if worst == priority and len(longest.waiting) <= self.waiting_of(key, priority) + 1:
            return None
        return longest.waiting[next(reversed(longest.waiting))]

    def push(
        self, request: Request, key: str, priority: int, cost: float, deadline: float, weight: int = 1
    ) -> Waiting[Request]:
        """Let a request wait. Raises Full."""
        own = self.waiting_of(key, priority)
        if own >= self._most_per_key:
            raise Full("key", own)
        if len(self) >= self._most:
            raise Full("all", len(self))
        active, idle = self._flows[priority], self._idle[priority]
        flow = active.get(key)
        if flow is None:
            flow = active[key] = idle.pop(key) if key in idle else _Flow()
            self._earn(flow, priority)
            if flow.owed:
                self._owed[priority][key] = None
        self._last_number += 1
        entry = Waiting(request, key, priority, cost, deadline, weight, self._last_number)
        flow.waiting[entry.number] = entry
        self._count(flow, entry, 1)
        return entry

    def remove(self, entry: Waiting[Request]) -> None:
        """Let a request go that will not be served here: its client has left, or its time is over."""
        if not entry.gone:
            self._leave(entry)
            self._settle(entry.key, entry.priority)

    def pop(self, room: float = math.inf, kept_for: float | None = None) -> Waiting[Request] | None:
        """Take the request whose turn it is and charge its key what is known of its cost.

        Args:
            kept_for: pass over keys that are not owed, and over those of which so many texts run.

        Returns:
            None when none waits, or when that one is heavier than `room`: lighter ones do not pass it.
        """
        for priority, flows in enumerate(self._flows):
            if flows:
                key = self._first_owed(priority, math.inf if kept_for is None else kept_for)
                if key is None and kept_for is None:
                    key = self._turn(priority, flows)
                return self._take(priority, key, room) if key is not None else None
        return None

    def charge(self, key: str, priority: int, tokens: float) -> None:
        """Take tokens that a running request has come to cost from its key, where others of its class wait.

        Fewer than none: a prompt that had been taken for more is paid back.
        """
        flow = self._find(key, priority)
        back = tokens < 0 and flow is not None and flow.period == self._period[priority]
        if flow and (self._flows[priority] or back):
            self._earn(flow, priority)
            flow.deficit = min(self.saved, flow.deficit - tokens)

    def end(self, key: str, priority: int, weight: int = 1) -> None:
        """Take note that a request that was taken has ended."""
        flow = self._find(key, priority)
        if flow:
            flow.running -= weight
            self._settle(key, priority)

    def expired(self, now: float) -> Iterator[Waiting[Request]]:
        """Remove and yield what has waited past its deadline."""
        for flows in self._flows:
            for flow in list(flows.values()):
                for entry in [each for each in flow.waiting.values() if each.deadline <= now]:
                    self.remove(entry)
                    yield entry

    # -- turns -----------------------------------------------------------------------------------------------------

    def _take(self, priority: int, key: str, room: float) -> Waiting[Request] | None:
        flows = self._flows[priority]
        flow = flows[key]
        entry = next(iter(flow.waiting.values()))
        if entry.weight > room:
            return None
        if key in self._owed[priority]:
            self._owed[priority].move_to_end(key)
        flow.deficit -= entry.cost
        flow.running += entry.weight
        self._leave(entry)
        if flow.deficit <= 0 and flow.waiting:
            flows.move_to_end(key)
        self._settle(key, priority)
        return entry

    def _first_owed(self, priority: int, most_running: float) -> str | None:
        """Return the first key that is owed and runs fewer texts than that, if there is one."""
        flows, owed = self._flows[priority], self._owed[priority]
        for key in list(itertools.takewhile(lambda key: not flows[key].owed, owed)):
            del owed[key]
        return next((key for key in owed if flows[key].may_go_first(most_running)), None)

    def _turn(self, priority: int, flows: OrderedDict[str, _Flow[Request]]) -> str:
        """Return the next key that may go, where none is owed; pay as many rounds as it takes until one may."""
        while True:
            for _ in range(len(flows)):
                key, flow = next(iter(flows.items()))
                self._earn(flow, priority)
                if flow.deficit > 0:
                    return key
                flows.move_to_end(key)
            most = max(flow.deficit for flow in flows.values())
            self._round[priority] += max(1, math.floor(-most / QUANTUM))

    def _earn(self, flow: _Flow[Request], priority: int) -> None:
        """Pay a key the rounds that it was not paid yet; one that is of an earlier period begins anew."""
        if flow.period != self._period[priority]:
            flow.period, flow.deficit = self._period[priority], 0.0 if flow.running else self.saved
        else:
            flow.deficit = min(self.saved, flow.deficit + QUANTUM * (self._round[priority] - flow.round))
        flow.round = self._round[priority]

    def _leave(self, entry: Waiting[Request]) -> None:
        entry.gone = True
        flow = self._flows[entry.priority][entry.key]
        del flow.waiting[entry.number]
        self._count(flow, entry, -1)

    def _count(self, flow: _Flow[Request], entry: Waiting[Request], sign: int) -> None:
        self._of_class[entry.priority] += sign
        self._weight_of_class[entry.priority] += sign * entry.weight
        flow.weight += sign * entry.weight

    def _settle(self, key: str, priority: int) -> None:
        """Move a key with nothing waiting out of the turns, and forget those that would begin as new ones do."""
        active, idle = self._flows[priority], self._idle[priority]
        flow = active.get(key)
        if flow and not flow.waiting:
            idle[key] = active.pop(key)
            self._owed[priority].pop(key, None)
            if not active:
                self._period[priority] += 1
        for known in (key, *itertools.islice(idle, 2)):
            if known in idle and self._as_new(idle[known], priority):
                del idle[known]

    def _as_new(self, flow: _Flow[Request], priority: int) -> bool:
        if flow.running:
            return False
        self._earn(flow, priority)
        return flow.deficit >= self.saved

    def _find(self, key: str, priority: int) -> _Flow[Request] | None:
        return self._flows[priority].get(key) or self._idle[priority].get(key)
