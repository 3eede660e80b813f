"""How many replicas a model needs, from the tokens that arrive and wait and the speed that its replicas have shown.

Serve's own policy counts requests in flight against a number that somebody chose; a request of 10 tokens and one of
4,000 are the same to it. Here two demands add up:

- the rate: tokens that arrive a second, over what one replica has shown to do, at `UTILISATION`;
- the backlog: tokens that wait, to be worked off within `catch_up_s` on top of that.

Up it goes at once. Down it goes to the most that was needed within the last `hold_s`, so that a pause shorter than that
changes nothing; a step down that had to be taken back at once doubles the hold (a square wave is learned in one or two
periods), and quiet halves it again.

Pure: one call a look, the time is an argument.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

UTILISATION = 0.8
"""Share of a replica's speed to plan with. Queues grow without bound as it nears 1."""
RATE_S = 2.0
"""Time constant of the rate of arrivals: a step is seen to 63 % after so long, and its backlog at once."""
SPEED_S = 10.0
"""Time constant of a replica's shown speed, over looks in which requests waited."""
REGRET_OF_HOLDS = 2.0
"""A step up within so many holds of a step down takes it back."""
LONGEST_HOLD_S = 900.0
NOTHING = 0.01
"""A hundredth of a replica is not worth one: an average that fades never is zero."""


class Look(NamedTuple):
    """What is known at one moment, over all gateways and replicas of one model."""

    now: float
    """Seconds of any steady clock."""
    arrived: float
    """Tokens of the requests that came since the last look: prompts, and what they are expected to generate."""
    waiting: float
    """Tokens of the requests that no replica works on."""
    running: float
    """Tokens that the requests being worked on still need."""
    done: float
    """Tokens worked off since the last look."""
    ready: int
    """Replicas that work."""
    starting: int
    """Replicas that will."""


class Decision(NamedTuple):
    """How many replicas there shall be, and why."""

    replicas: int
    reason: str


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


class WorkPolicy:
    """The policy of one model, with what it has learned."""

    def __init__(self, bounds: Bounds, speed: float | None = None) -> None:
        """`speed`: tokens a second of one busy replica, where it is known from before."""
        self._bounds = bounds
        self.speed = speed
        """Tokens a second that one busy replica has shown; None until one was busy."""
        self.hold_s = bounds.hold_s
        self._was_busy = speed is not None
        """Whether the speed is one of a replica that could not do more, and not just what it was asked for."""
        self._rate = 0.0
        self._last: float | None = None
        self._needed: deque[tuple[float, int]] = deque()
        """(when, how many) of the hold, with falling numbers: the first is the most within it."""
        self._target = max(bounds.least, 0)
        self._went_down: float | None = None

    def decide(self, look: Look) -> Decision:
        """Take one look and return how many replicas there shall be."""
        self._learn(look)
        needed, why = self._demand(look)
        self._remember(look.now, needed)
        target, reason = self._settle(look, needed, why)
        if target > self._target:
            self._regret(look.now)
        elif target < self._target:
            self._went_down = look.now
        self._target = target
        return Decision(target, reason)

    # -- demand ----------------------------------------------------------------------------------------------------

    def _learn(self, look: Look) -> None:
        if self._last is None:
            self._last = look.now
            return
        passed = max(1e-6, look.now - self._last)
        self._last = look.now
        self._rate += (look.arrived / passed - self._rate) * (1 - math.exp(-passed / RATE_S))
        if not look.ready or not look.done:
            return
        shown = look.done / passed / look.ready
        if self.speed is None or shown > self.speed:
            self.speed = shown  # it may do more, but no less
        elif look.waiting:
            self.speed += (shown - self.speed) * (1 - math.exp(-passed / SPEED_S))
        self._was_busy |= look.waiting > 0

    def _demand(self, look: Look) -> tuple[int, str]:
        if not self.speed:
            wanted = max(1, look.ready + look.starting) if look.waiting or look.running else 0
            return wanted, "speed not known yet"
        for_rate = self._rate / (UTILISATION * self.speed)
        for_backlog = look.waiting / (self.speed * self._bounds.catch_up_s)
        needed = math.ceil(for_rate + for_backlog - NOTHING)
        if not self._was_busy:
            needed = min(needed, 2 * max(1, look.ready + look.starting))
        if not needed and (look.running or look.waiting):
            needed = 1
        return needed, (
            f"{self._rate:,.0f} tokens/s arrive and {look.waiting:,.0f} tokens wait, a replica does {self.speed:,.0f}/s"
        )

    # -- steps -----------------------------------------------------------------------------------------------------

    def _settle(self, look: Look, needed: int, why: str) -> tuple[int, str]:
        least, most = self._bounds.least, self._bounds.most
        if needed > self._target:
            capped = max(least, min(most, needed))
            return capped, f"up: {why}" + (f"; {needed} are needed, {most} is the most" if needed > most else "")
        peak = self._needed[0][1]
        held = max(least, min(most, peak))
        if held < self._target:
            return held, f"down: {peak} were enough for {self.hold_s:.0f} s; {why}"
        return max(least, min(most, self._target)), f"stays: {why}" + (
            f"; {peak} in the last {self.hold_s:.0f} s" if peak > needed else ""
        )

    def _remember(self, now: float, needed: int) -> None:
        while self._needed and self._needed[-1][1] <= needed:
            self._needed.pop()
        self._needed.append((now, needed))
        while now - self._needed[0][0] > self.hold_s:
            self._needed.popleft()

    def _regret(self, now: float) -> None:
        """Hold longer where the last step down is taken back, and less long again after a quiet time."""
        if self._went_down is None:
            return
        since = now - self._went_down
        self._went_down = None
        if since < REGRET_OF_HOLDS * self.hold_s:
            self.hold_s = min(LONGEST_HOLD_S, 2 * self.hold_s)
        elif since > 10 * self.hold_s:
            self.hold_s = max(self._bounds.hold_s, self.hold_s / 2)
