"""Many contenders for one run, step by step in a time of their own, over objects as a store keeps them.

Every step may take long, be followed by a pause longer than any silence that is waited for, or be a contender's last;
what was on its way then arrives at once, much later, or never. A list is no snapshot. Clocks run at paces of their own.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from jobs import lease_contest, lease_objects
from jobs.lease import Owner
from jobs.lease_contest import List, Now, Owned, Read, Remove, Standing, Step, Steps, Timing, Wait, Won, World, Write

TIMING = Timing.of(beat_s=5.0, stale_s=30.0)
SLOWEST, FASTEST = 0.9, 1.1


@dataclass
class Chaos:
    """How likely there is a pause before something is written, a step is the last one, or it takes long."""

    pause: float = 0.25
    crash: float = 0.003
    slow: float = 0.05
    longest_s: float = 3 * TIMING.stale_s


CALM = Chaos(0, 0, 0, 0)


@dataclass
class Contender:
    """One process."""

    name: str
    host: str
    offset: float
    pace: float
    steps: Steps[Any] | None = None
    began: float = 0.0
    won: Won | None = None
    state: str = "contends"
    """Or `holds`, `lost`, `lets go`, `released`, `refused`, `crashed`."""
    beats_left: int = 0
    once: bool = False
    """It does not contend again after it has let go."""


@dataclass
class Simulation:
    """A world of contenders. `violations` are what must never be."""

    seed: int
    timing: Timing = TIMING
    chaos: Chaos = field(default_factory=Chaos)
    marks: bool = True
    """False: choosing marks are lost, which must be found out."""

    def __post_init__(self) -> None:
        self.random, self.now, self._count = random.Random(self.seed), 0.0, 0
        self.objects: dict[str, bytes] = {}
        self.changes: dict[str, list[float]] = {}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self.contenders: list[Contender] = []
        self.numbers: list[int] = []
        self.violations: list[str] = []
        self.taken_over = 0
        self._highest, self._held = 0, set[int]()
        """Also by those who died before they could say that they had won."""
        self._token = 0

    def start(self, name: str, host: str, at: float, *, once: bool = False) -> Contender:
        """Let one contend from a time on, again and again."""
        pace = self.random.uniform(SLOWEST, FASTEST)
        one = Contender(name, host, self.random.uniform(-1e6, 1e6), pace, once=once)
        self.contenders.append(one)
        self._at(at, lambda: self._begin(one))
        return one

    def run(self, until: float) -> None:
        """Let time pass."""
        while self._events and self._events[0][0] <= until:
            self.now, _, event = heapq.heappop(self._events)
            event()
            self._watch_numbers()
        self.now = until

    # -- contenders --------------------------------------------------------------------------------------------------

    def _begin(self, one: Contender) -> None:
        owner = Owner(one.host, self.contenders.index(one) + 1, 0.0, one.name, "now")
        world = World(owner, self.timing, self._new_token, lambda other: self._standing(one, other))
        one.steps, one.began, one.state = lease_contest.contend(world), self.now, "contends"
        self._go_on(one, None)

    def _new_token(self) -> str:
        self._token += 1
        return f"{self.random.randrange(1 << 32):08x}{self._token:08x}"

    def _standing(self, one: Contender, owner: Owner) -> Standing:
        if owner.host != one.host:
            return "elsewhere"
        return "gone" if self.contenders[owner.pid - 1].state == "crashed" else "lives"

    def _go_on(self, one: Contender, answer: Any) -> None:
        if one.state == "crashed":
            return
        assert one.steps is not None
        try:
            step = one.steps.send(answer)
        except Owned:
            one.state = "refused"
            self._at(self.now + self.random.uniform(0, 5), lambda: self._begin(one))
        except StopIteration as end:
            self._ended(one, end.value)
        else:
            self._issue(one, step)

    def _ended(self, one: Contender, value: Any) -> None:
        if one.state in ("holds", "lets go"):
            one.state = value
            if value == "released" and not one.once:
                self._at(self.now + self.random.uniform(0, 5), lambda: self._begin(one))
            return
        self._check_win(one, value)
        one.beats_left = self.random.randrange(0, 4)
        one.won, one.state = value, "holds"
        one.steps = self._holding(one, value)
        self._go_on(one, None)

    def _holding(self, one: Contender, won: Won) -> Steps[str]:
        owner = Owner(one.host, self.contenders.index(one) + 1, 0.0, one.name, "now")
        for beat in range(one.beats_left):
            yield Wait(self.timing.beat_s)
            if lease_objects.newest(lease_objects.parsed((yield List()))) != won.claim.number:
                return "lost"
            yield Write(str(won.claim), lease_objects.content(owner, won.beats + beat + 1))
        one.state = "lets go"
        released = Owner(**{**vars(owner), "released": True})
        yield Write(str(won.claim), lease_objects.content(released, won.beats + one.beats_left + 1))
        return "released"

    # -- what must never be ------------------------------------------------------------------------------------------

    def _check_win(self, one: Contender, won: Won) -> None:
        number = won.claim.number
        if number in self.numbers:
            self.violations.append(f"{number} was won twice")
        last = max((each for each in self._held if each < number), default=0)
        self.numbers.append(number)
        for other in self.contenders:  # of those that sleep, others may have passed some before
            if other is one or other.state != "holds" or other.won is None or other.won.claim.number != last:
                continue
            self.taken_over += 1
            needed = self.timing.stale_s / FASTEST
            if self._silence(str(other.won.claim), one.began) < needed - 1e-6:
                self.violations.append(f"{one.name} took {number} from {other.name}, who showed signs of life")

    def _silence(self, name: str, since: float) -> float:
        """Return the longest time without a change of an object since a time."""
        inside = [at for at in self.changes.get(name, []) if at > since]
        times = [since, *inside, self.now]
        return max(later - earlier for earlier, later in pairwise(times))

    def _watch_numbers(self) -> None:
        found = lease_objects.newest(lease_objects.parsed(self.objects))
        self._held.add(found)
        if found < self._highest:
            self.violations.append(f"the number fell from {self._highest} to {found}")
        self._highest = max(self._highest, found)

    # -- the store, and time -----------------------------------------------------------------------------------------

    def _at(self, time: float, event: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (time, self._count, event))

    def _long(self) -> float:
        """Return a time of any order of magnitude from a fifth of a second on."""
        return 0.2 * (self.chaos.longest_s / 0.2) ** self.random.random()

    def _issue(self, one: Contender, step: Step) -> None:
        chance, chaos = self.random.random, self.chaos
        if chance() < chaos.crash:
            one.state = "crashed"
            if isinstance(step, Write | Remove) and chance() < 0.7:
                self._at(self.now + chance() * self.random.choice([1.0, chaos.longest_s]), lambda: self._apply(step))
            return
        pause = self._long() if isinstance(step, Write) and chance() < chaos.pause else 0.0
        self._at(self.now + pause, lambda: self._take(one, step))

    def _take(self, one: Contender, step: Step) -> None:
        takes = self.random.uniform(0.01, 0.3)
        if self.random.random() < self.chaos.slow:
            takes = self._long() / 2
        done = self.now + takes
        if isinstance(step, Now):
            self._go_on(one, one.offset + one.pace * self.now)
        elif isinstance(step, Wait):
            self._at(self.now + step.seconds / one.pace, lambda: self._go_on(one, None))
        elif isinstance(step, List):
            before = set(self.objects)
            self._at(done, lambda: self._go_on(one, self._listed(before)))
        elif isinstance(step, Read):
            box: list[bytes | None] = []
            self._at(self.random.uniform(self.now, done), lambda: box.append(self.objects.get(step.name)))
            self._at(done, lambda: self._go_on(one, box[0]))
        else:
            self._at(self.random.uniform(self.now, done), lambda: self._apply(step))
            self._at(done, lambda: self._go_on(one, None))

    def _listed(self, before: set[str]) -> list[str]:
        after = set(self.objects)
        unsure = sorted(before ^ after)
        return sorted((before & after) | {name for name in unsure if self.random.random() < 0.5})

    def _apply(self, step: Write | Remove) -> None:
        if isinstance(step, Remove):
            self.objects.pop(step.name, None)
        elif self.marks or not step.name.startswith("choosing"):
            self.objects[step.name] = step.content
        self.changes.setdefault(step.name, []).append(self.now)


def schedule(seed: int, **settings: Any) -> Simulation:
    """Return a world of two to six contenders on one to three hosts, after five minutes of chaos."""
    world = Simulation(seed, **settings)
    number, within_s = world.random.randrange(2, 7), world.random.choice([1, 50])
    for at in range(number):
        world.start(f"c{at}", f"host-{world.random.randrange(3)}", world.random.uniform(0, within_s))
    world.run(300.0)
    return world


def schedules(count: int, **settings: Any) -> Iterator[Simulation]:
    """Yield as many of them."""
    yield from (schedule(seed, **settings) for seed in range(count))
