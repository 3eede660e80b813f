"""How many replicas a model needs, from the tokens that arrive and wait and the speed that its replicas have shown.

Serve's own policy counts requests in flight against a number that somebody chose; a request of 10 tokens and one of
4,000 are the same to it. Here two demands add up:

- the rate: tokens that arrive a second, over what one replica has shown to do, at `UTILISATION`;
- the backlog: tokens that wait, to be worked off within `catch_up_s` on top of that.

Until a replica has had all its slots in use, its speed is only what was asked of it: the slots in use decide then.
When and how far the number then moves is said in serve/scaling/steps.py.

Pure: one call a look, the time is an argument.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from serve.scaling.steps import Bounds, Decision, Need, Steps

UTILISATION = 0.8
"""Share of a replica's speed to plan with. Queues grow without bound as it nears 1."""
RATE_S = 2.0
"""Time constant of the rate of arrivals: a step is seen to 63 % after so long, and its backlog at once."""
SPEED_S = 10.0
"""Time constant of a replica's shown speed, over looks in which all slots were in use."""
SHOWN_S = 3.0
"""Time constant of what a replica does that could do more: a prompt is done in one moment, and is no speed."""
LEAST_USED = 0.5
"""Share of the slots that shall be in use, whatever the speed says: one that was learned too low is found out so."""
NOTHING = 0.01
"""A hundredth of a replica is not worth one: an average that fades never is zero."""


class Look(NamedTuple):
    """What is known at one moment, over all gateways and replicas of one model."""

    now: float
    """Seconds of any steady clock."""
    arrived: float
    """Tokens of the requests that came since the last look: prompts, and what they are expected to generate. Negative
    where earlier ones generated less than was expected."""
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
    full: bool = False
    """Whether the replicas that work have all their slots in use."""
    by_slots: float = 0.0
    """Replicas whose slots the requests there are would fill."""


class WorkPolicy:
    """The policy of one model, with what it has learned."""

    def __init__(self, bounds: Bounds, speed: float | None = None, target: int | None = None) -> None:
        """Begin.

        Args:
            bounds: what the spec allows.
            speed: tokens a second of one busy replica, where it is known from before.
            target: replicas that there are or will be; the least where it is not known.
        """
        self.steps = Steps(bounds, target)
        self.speed = speed
        """Tokens a second that one busy replica has shown; None until one was busy."""
        self._was_busy = speed is not None
        """Whether the speed is one of a replica that could not do more, and not just what it was asked for."""
        self._rate = self._shown = 0.0
        self._full_s = SPEED_S if speed is not None else 0.0
        self._last: float | None = None

    @property
    def busy_speed(self) -> float | None:
        """Tokens a second of one replica that could not do more; None where none was seen."""
        return self.speed if self._was_busy else None

    def decide(self, look: Look) -> Decision:
        """Take one look and return how many replicas there shall be."""
        self._learn(look)
        return self.steps.settle(look.now, self._demand(look))

    def _learn(self, look: Look) -> None:
        if self._last is None:
            self._last = look.now
            return
        passed = max(1e-6, look.now - self._last)
        self._last = look.now
        self._rate += (look.arrived / passed - self._rate) * _share(passed, RATE_S)
        if not look.ready:
            self._shown = 0.0
            return
        did = look.done / passed / look.ready
        self._shown += (did - self._shown) * _share(passed, SHOWN_S)
        if look.full and look.done:
            self._learn_busy(did, passed)
        elif self.speed is None or self._shown > self.speed:
            self.speed = self._shown or None  # it may do more, but no less

    def _learn_busy(self, did: float, passed: float) -> None:
        """Average over the first looks at full slots, then over the last `SPEED_S` of such looks."""
        if not self._was_busy or self.speed is None:
            self.speed, self._was_busy = did, True
        self._full_s += passed
        self.speed += (did - self.speed) * max(min(1.0, passed / self._full_s), _share(passed, SPEED_S))

    def _demand(self, look: Look) -> Need:
        there, present = max(1, look.ready + look.starting), 1 if look.waiting or look.running else 0
        if not self.speed or not self._was_busy:
            needed = min(max(present, math.ceil(look.by_slots - NOTHING)), 2 * there)
            known = "the speed of a busy replica is not known yet"
            return Need(needed, "slots", f"requests for the slots of {look.by_slots:.1f} replicas, {known}")
        rate = max(0.0, self._rate)
        for_rate = rate / (UTILISATION * self.speed)
        for_backlog = look.waiting / (self.speed * self.steps.bounds.catch_up_s)
        needed = math.ceil(min(for_rate + for_backlog, look.by_slots / LEAST_USED) - NOTHING)
        needed = max(present, needed)
        return Need(
            needed,
            "rate" if for_rate >= for_backlog else "backlog",
            f"{rate:,.0f} tokens/s arrive and {look.waiting:,.0f} tokens wait, a replica does {self.speed:,.0f}/s",
        )


def _share(passed: float, constant: float) -> float:
    """Return how much of an exponential average the newest value is."""
    return 1 - math.exp(-passed / constant)
