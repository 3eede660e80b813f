"""How contenders for a run agree on one, where nothing but whole objects can be written, read, listed and deleted.

    choosing-<id>.json         a contender is choosing a number
    claim-00000003-<id>.json   the number it chose, who it is, and a count of its signs of life
    held-00000003-<id>         it has won with that number

No object is ever written by two: an id is of one contender and one round. What is needed of the store: a write is whole
or not there, and a read or a list that begins after a write or a deletion has ended sees it. S3 says so since December
2020 ("Amazon S3 data consistency model"), Google Cloud Storage ("Cloud Storage consistency") and Azure Blob Storage do
too; not every store that speaks S3 does (StorageGRID's default is weaker for objects that are written anew), and such a
one must be set to strong consistency. A list need not be a snapshot. Of clocks, only each contender's own monotonic one
counts, which must run at a pace within a quarter of the others'; no two clocks are ever compared, and the store's times
are not looked at.

A round is Lamport's bakery (1974, "A new solution of Dijkstra's concurrent programming problem"):

    mark      write choosing-<id>
    choose    list; the number is one more than the highest of all claims and held marks
    claim     write claim-<number>-<id>, remove choosing-<id>; from now on show signs of life
    clear     list until no other's choosing mark is there that has not been given up
    look      list, again: a claim with a lower (number, id) that was not given up before the round wins; else I do
    hold      write held-<number>-<id>

Claims and marks are given up before a round: those let go, those whose process is known to be gone, and those watched
without a change for STALE_S, counted over looks that succeeded and followed each other closely. What makes giving up
safe is that a contender distrusts itself sooner (VALID_S, half of STALE_S): it abandons its round when more than that
passed from before its mark to after its claim, from one sign of life to the end of the next, or from the last one to
the moment when it has looked and wins.

1. Who gives a mark up sees the claim that counts: the mark was watched for longer than its writer's round may last, so
   either the claim is written by then, or its writer abandons it.
2. Of two with winning rounds, a and b, (number, id) of a the lower: b has seen a's claim when it looked. Otherwise b's
   list ended before a's claim was written, so a's choice, which is not above b's number, began before b's claim was
   there, so a's mark stood while b cleared the way: by 1 b would have waited until a's claim was there.
3. b wins with that claim in sight only if it gave it up before its own round: then a had been silent for STALE_S, which
   is after a had won (its signs of life were never further apart than VALID_S before), or a had let go or ended. And b
   has seen a's number when it chose, so b's is higher.

So no number is won twice, later winners have higher numbers, and a winner is replaced only after a silence of STALE_S.
One that wakes up from such a silence finds a higher held mark than its own: it has lost. What arrives late (a request
that hung in the network, or that a killed process had sent) is an object of a round that nobody counts on any more; it
is given up like any other. Somebody wins: the lowest claim of those who show signs of life is nobody's to pass.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar

from jobs.lease import Owner
from jobs.lease_objects import Name, Watch, content, newest, owner_of, parsed, wins

Value = TypeVar("Value")


@dataclass(frozen=True)
class Timing:
    """Seconds by which contenders judge each other and themselves; the same for all that contend for a run."""

    beat_s: float
    """Between two signs of life."""
    stale_s: float
    """So long a silence is an end."""
    valid_s: float
    """So long a contender trusts what it has done itself."""
    poll_s: float
    """Between two looks."""

    @classmethod
    def of(cls, beat_s: float, stale_s: float) -> Timing:
        """Return the times that go with two of them."""
        assert 3 * beat_s <= stale_s, "a sign of life may be late"
        return cls(beat_s, stale_s, stale_s / 2, min(0.5, beat_s / 4))


# Steps: what a contender asks of the world. They are yielded, and answered by jobs/store_lease.py or by a simulation.


@dataclass(frozen=True)
class Write:
    """Write an object. Nothing is answered."""

    name: str
    content: bytes


@dataclass(frozen=True)
class Remove:
    """Delete an object, which may be gone. Nothing is answered."""

    name: str


@dataclass(frozen=True)
class Read:
    """Read an object: its content, or None."""

    name: str


@dataclass(frozen=True)
class List:
    """List the objects: their names."""


@dataclass(frozen=True)
class Wait:
    """Let time pass. Nothing is answered."""

    seconds: float


@dataclass(frozen=True)
class Now:
    """Ask the own monotonic clock: seconds."""


Step: TypeAlias = Write | Remove | Read | List | Wait | Now
Steps: TypeAlias = Generator[Step, Any, Value]
Standing: TypeAlias = Literal["gone", "stopped", "lives", "elsewhere"]


@dataclass(frozen=True)
class World:
    """What a contender knows without the store."""

    me: Owner
    timing: Timing
    token: Callable[[], str]
    """Returns a new id, in hex."""
    standing: Callable[[Owner], Standing]
    """Says what is seen from here of an owner's process."""
    on_wait: Callable[[Owner], object] = lambda owner: None
    """Called once for each owner whose signs of life are waited for."""


class Owned(Exception):
    """Somebody holds the run."""

    def __init__(self, owner: Owner, stopped: bool) -> None:
        super().__init__(owner)
        self.owner, self.stopped = owner, stopped


@dataclass(frozen=True)
class Won:
    """A round that was won."""

    claim: Name
    beats: int
    """Signs of life shown so far."""


def contend(world: World) -> Steps[Won]:
    """Take part until the run is won.

    Raises:
        Owned: somebody holds it, and shows signs of life.
    """
    while True:
        given_up = yield from _survey(world)
        won = yield from _round(world, given_up)
        if won is not None:
            yield from _clear(won, given_up)
            return won


def _survey(world: World) -> Steps[dict[Name, bytes | None]]:
    """Watch until all that is there can be given up; return it, with its content."""
    watches: dict[Name, Watch] = {}
    told: set[str] = set()
    while True:
        found = yield from _look(watches, world.timing)
        held = {name.id for name in found if name.kind == "held"}
        waiting = False
        for name, text in found.items():
            if name.kind == "held" or _is_over(text, watches[name], world):
                continue
            owner = owner_of(text)
            if name.id in held:
                _refuse_if_alive(owner, watches[name], world)
                if name.id not in told:
                    world.on_wait(owner)
                told.add(name.id)
            waiting = True
        if not waiting:
            return found
        yield Wait(world.timing.poll_s)


def _is_over(text: bytes | None, watch: Watch, world: World) -> bool:
    """Say whether a claim or a mark can be given up."""
    owner = owner_of(text)
    return text is None or owner.released or watch.silent_s >= world.timing.stale_s or world.standing(owner) == "gone"


def _refuse_if_alive(owner: Owner, watch: Watch, world: World) -> None:
    standing = world.standing(owner)
    if watch.changed or standing in ("lives", "stopped"):
        raise Owned(owner, standing == "stopped")


def _look(watches: dict[Name, Watch], timing: Timing) -> Steps[dict[Name, bytes | None]]:
    """Read all that is there, once; `watches` are brought up to date. A held mark's content is not read."""
    began = yield Now()
    names = parsed((yield List()))
    found: dict[Name, bytes | None] = {}
    for name in names:
        found[name] = None if name.kind == "held" else (yield Read(str(name)))
    ended = yield Now()
    held = {name.id for name in names if name.kind == "held"}
    for gone in watches.keys() - found.keys():
        del watches[gone]
    for name, text in found.items():
        watches.setdefault(name, Watch()).look((text, name.id in held), began, ended, 4 * timing.beat_s)
    return found


def _round(world: World, given_up: Mapping[Name, bytes | None]) -> Steps[Won | None]:
    """Claim the run once; None: somebody else was first, or it took too long to be trusted."""
    identity = world.token()
    mark, timing = Name("choosing", 0, identity), world.timing
    began = yield Now()
    yield Write(str(mark), content(world.me, 0))
    names = parsed((yield List()))
    claim = Name("claim", max((name.number for name in names), default=0) + 1, identity)
    signs = _Signs(world.me, claim, timing)
    in_time = yield from signs.show()
    if not in_time or (yield Now()) - began > timing.valid_s:
        yield from _withdraw(mark, claim)
        return None
    yield Remove(str(mark))
    won = yield from _first(world, claim, signs, given_up)
    if won and (yield Now()) - signs.shown_at <= timing.valid_s:
        yield Write(str(Name("held", claim.number, identity)), b".")
        if newest(parsed((yield List()))) == claim.number:
            return Won(claim, signs.count)
    yield from _withdraw(mark, claim)
    return None


def _first(world: World, claim: Name, signs: _Signs, given_up: Mapping[Name, bytes | None]) -> Steps[bool]:
    """Wait until nobody is choosing, look, and say whether the claim is first."""
    watches: dict[Name, Watch] = {}
    while True:
        found = yield from _look(watches, world.timing)
        marks = [name for name in found if name.kind == "choosing" and name not in given_up]
        if all(_is_over(found[name], watches[name], world) for name in marks):
            break
        yield Wait(world.timing.poll_s)
        if not (yield from signs.show_if_due()):
            return False
    names = parsed((yield List()))
    for name, text in given_up.items():  # one that has woken up meanwhile
        if name.kind == "claim" and (yield Read(str(name))) not in (text, None):
            return False
    return wins(claim, names, given_up)


class _Signs:
    """The signs of life of one claim."""

    def __init__(self, me: Owner, claim: Name, timing: Timing) -> None:
        self._me, self._claim, self._timing = me, claim, timing
        self.count = 0
        self.shown_at = 0.0
        """When the last one began."""

    def show(self) -> Steps[bool]:
        """Show one; say whether it has come in time after the last."""
        began: float = yield Now()
        before = self.shown_at if self.count else began
        self.count += 1
        self.shown_at = began
        yield Write(str(self._claim), content(self._me, self.count))
        ended: float = yield Now()
        return ended - before <= self._timing.valid_s

    def show_if_due(self) -> Steps[bool]:
        """Show one if the last was some time ago."""
        if (yield Now()) - self.shown_at < self._timing.beat_s:
            return True
        return (yield from self.show())


def _withdraw(mark: Name, claim: Name) -> Steps[None]:
    yield Remove(str(mark))
    yield Remove(str(claim))


def _clear(won: Won, given_up: Mapping[Name, bytes | None]) -> Steps[None]:
    """Remove what decides nothing any more."""
    for name in given_up:
        if name.kind == "choosing" or name.number < won.claim.number:
            yield Remove(str(name))
