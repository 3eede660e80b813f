"""From how many replicas are needed at each look to how many there shall be: up soon, down late, no flapping.

Up it goes when more has been needed for `up_after_s`. Down it goes to the most that was needed within the last
`hold_s`, so that a pause shorter than that changes nothing; a step down that had to be taken back at once doubles the
hold (a square wave is learned in one or two periods), and quiet halves it again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

REGRET_OF_HOLDS = 2.0
"""A step up within so many holds of a step down takes it back."""
MOST_OF_HOLDS = 4.0
"""The hold grows to so many times what the spec says: each doubling saves a few waits, and costs more replicas."""

Kind = Literal["stays", "rate", "backlog", "slots", "requests", "wake", "quiet", "bounds"]
"""Why: the tokens that arrive, those that wait, slots in use, open requests, a first request at zero, little to do, or
what the spec allows."""


class Need(NamedTuple):
    """How many replicas the work of this moment needs."""

    replicas: int
    kind: Kind
    why: str
    """The figures, as a sentence's part."""


class Decision(NamedTuple):
    """How many replicas there shall be, and why."""

    replicas: int
    reason: str
    kind: Kind = "stays"


@dataclass(frozen=True)
class Bounds:
    """What the spec allows."""

    least: int
    """0 lets the model go to zero."""
    most: int
    hold_s: float = 30.0
    """How long less must be enough before replicas are removed."""
    catch_up_s: float = 5.0
    """How soon what waits shall be worked off."""
    up_after_s: float = 0.0
    """How long more must be needed before replicas are added; the first one at zero does not wait."""

    def clamp(self, count: int) -> int:
        """Return the number nearest to `count` that is allowed."""
        return max(self.least, min(self.most, count))


class Extreme:
    """The largest (or smallest) of the numbers seen within a span."""

    def __init__(self, beats: Callable[[int, int], bool]) -> None:
        """`beats(new, old)`: whether an old number can never be the extreme again."""
        self._beats = beats
        self._seen: deque[tuple[float, int]] = deque()

    def add(self, now: float, value: int) -> None:
        while self._seen and self._beats(value, self._seen[-1][1]):
            self._seen.pop()
        self._seen.append((now, value))

    def within(self, now: float, span_s: float) -> int:
        """Forget what is older than the span, and return the extreme of the rest; the newest one always counts."""
        while len(self._seen) > 1 and now - self._seen[0][0] > span_s:
            self._seen.popleft()
        return self._seen[0][1]


class Steps:
    """The number of replicas of one thing, and what was learned about changing it."""

    def __init__(self, bounds: Bounds, target: int | None = None) -> None:
        """`target`: the number that there is; the least where it is not known."""
        self.bounds = bounds
        self.hold_s = bounds.hold_s
        self._went_down: float | None = None
        self.restart(bounds.least if target is None else target)

    def restart(self, target: int) -> None:
        """Go on from a number that somebody else has set: for one hold it counts as needed."""
        self.target = target
        self._peak, self._floor = Extreme(lambda new, old: new >= old), Extreme(lambda new, old: new <= old)
        self._begun = False

    def allow(self, bounds: Bounds) -> None:
        """Take new bounds."""
        if bounds.hold_s != self.bounds.hold_s:
            self.hold_s = bounds.hold_s
        self.bounds = bounds

    def settle(self, now: float, need: Need) -> Decision:
        """Take what one look needs and return how many there shall be."""
        self._remember(now, need.replicas)
        decision = self._settled(now, need)
        if decision.replicas > self.target:
            self._regret(now)
        elif decision.replicas < self.target:
            self._went_down = now
        self.target = decision.replicas
        return decision

    def _settled(self, now: float, need: Need) -> Decision:
        bounds, target = self.bounds, self.target
        lasting = need.replicas if target == 0 else self._floor.within(now, bounds.up_after_s)
        peak = self._peak.within(now, self.hold_s)
        if (raised := bounds.clamp(max(lasting, target))) > target:
            return self._up(raised, lasting, need)
        held = bounds.clamp(min(max(peak, lasting), target))
        if held < target:
            if target > bounds.most:
                return Decision(held, f"down: {bounds.most} is the most that the spec allows", "bounds")
            enough = f"down: {peak} {'was' if peak == 1 else 'were'} enough for {self.hold_s:.0f} s"
            return Decision(held, f"{enough}; {need.why}", "quiet")
        more = f"; {peak} in the last {self.hold_s:.0f} s" if peak > need.replicas else ""
        return Decision(target, f"stays: {need.why}{more}")

    def _up(self, raised: int, lasting: int, need: Need) -> Decision:
        if lasting < raised:
            return Decision(raised, f"up: {raised} is the least that the spec allows", "bounds")
        capped = f"; {lasting} are needed, {raised} is the most" if lasting > raised else ""
        return Decision(raised, f"up: {need.why}{capped}", "wake" if self.target == 0 else need.kind)

    def _remember(self, now: float, needed: int) -> None:
        if not self._begun:  # what there is was needed until now, as far as anyone knows
            self._begun = True
            self._peak.add(now, self.target)
            self._floor.add(now, self.target)
        self._peak.add(now, needed)
        self._floor.add(now, needed)

    def _regret(self, now: float) -> None:
        """Hold longer where the last step down is taken back, and less long again after a quiet time."""
        if self._went_down is None:
            return
        since = now - self._went_down
        self._went_down = None
        if since < REGRET_OF_HOLDS * self.hold_s:
            self.hold_s = min(MOST_OF_HOLDS * self.bounds.hold_s, 2 * self.hold_s)
        elif since > 10 * self.hold_s:
            self.hold_s = max(self.bounds.hold_s, self.hold_s / 2)
