"""A pole on a cart, and a controller that keeps it upright: the log `pole-balance` that a policy is learned from.

The dynamics are those of Barto, Sutton and Anderson 1983 ("Neuronlike adaptive elements that can solve difficult
learning control problems"), with Euler's method at 50 steps a second. The controller is linear; what the log calls
right is its choice in each state, while now and then another force is applied, so that the log also holds states in
which something has gone wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

STEP_S = 0.02
FORCE_N = 10.0
"""The strongest force on the cart."""
GRAVITY, CART_KG, POLE_KG, HALF_LENGTH_M = 9.8, 1.0, 0.1, 0.5
FALLEN = math.radians(12)
"""A pole that leans more has fallen."""
OFF_M = 2.4
"""A cart this far from the middle has left its track."""
GAINS = (1.0, 2.0, 30.0, 5.0)
"""The controller's, in N for each unit of position, velocity, angle and angular velocity."""
EPISODES, STEPS = 60, 100


@dataclass(frozen=True)
class State:
    """Position (m) and velocity of the cart, angle (radians from upright) and angular velocity of the pole."""

    position: float
    velocity: float
    angle: float
    turning: float

    def after(self, force: float) -> State:
        """Return the state a step later, with `force` newtons on the cart."""
        mass, lever = CART_KG + POLE_KG, POLE_KG * HALF_LENGTH_M
        sine, cosine = math.sin(self.angle), math.cos(self.angle)
        push = (force + lever * self.turning**2 * sine) / mass
        turns = (GRAVITY * sine - cosine * push) / (HALF_LENGTH_M * (4 / 3 - POLE_KG * cosine**2 / mass))
        speeds_up = push - lever * turns * cosine / mass
        return State(
            self.position + STEP_S * self.velocity,
            self.velocity + STEP_S * speeds_up,
            self.angle + STEP_S * self.turning,
            self.turning + STEP_S * turns,
        )

    @property
    def lost(self) -> bool:
        """Whether the pole has fallen, or the cart has left its track."""
        return abs(self.angle) > FALLEN or abs(self.position) > OFF_M

    @property
    def observation(self) -> list[float]:
        """What a policy sees."""
        return [self.position, self.velocity, self.angle, self.turning]


def controlled(state: State) -> float:
    """Return the controller's force, within ±FORCE_N."""
    wanted = sum(gain * value for gain, value in zip(GAINS, state.observation, strict=True))
    return max(-FORCE_N, min(FORCE_N, wanted))


def drawn(draw: np.random.Generator) -> State:
    """Draw a state to begin with."""
    return State(*draw.uniform(-1, 1, 4) * (0.5, 0.3, 0.1, 0.3))


def episodes() -> Iterator[dict[str, Any]]:
    """Yield the log: episode, step, observation (4 numbers), action ("left" or "right"), and force in newtons."""
    draw = np.random.default_rng(0)
    for episode in range(EPISODES):
        state = drawn(draw)
        for step in range(STEPS):
            force = controlled(state)
            yield {
                "episode": episode,
                "step": step,
                "observation": state.observation,
                "action": "right" if force > 0 else "left",
                "force": force,
            }
            disturbed = draw.random() < 0.3
            state = state.after(draw.uniform(-FORCE_N, FORCE_N) if disturbed else force)
            if state.lost:
                break
