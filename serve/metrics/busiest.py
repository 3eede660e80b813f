"""Tokens by key, for the busiest keys only: a label with a value for every key would make as many series.

Who is busiest is looked at again once a minute. A key that is put out of the table goes into `other` with all it had,
so that `other` never falls; one that comes into it begins at zero.
"""

from __future__ import annotations

import time
from collections.abc import Callable

MOST = 50
CANDIDATES = 10_000
"""Keys whose recent tokens are remembered."""
LOOK_S = 60.0
FORGET = 0.5
"""What is left of a key's recent tokens after a look."""
CLEARLY = 2.0
"""How much busier a key must be to take another one's place: two alike would change places for ever."""
OTHER = "other"

Labels = tuple[str, str, str]
"""Key, model, kind."""


class BusiestKeys:
    """The tokens of the busiest keys, and of all others together."""

    def __init__(self, most: int = MOST, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._clock = most, clock
        self._shown: dict[str, dict[tuple[str, str], int]] = {}
        self._other: dict[tuple[str, str], int] = {}
        self._recent: dict[str, float] = {}
        self._looked = clock()

    def add(self, key: str, model: str, kind: str, tokens: int) -> None:
        """Count tokens of a key."""
        if key in self._recent or len(self._recent) < CANDIDATES:
            self._recent[key] = self._recent.get(key, 0.0) + tokens
        counted = self._shown.get(key)
        if counted is None:
            counted = self._other
            if len(self._shown) < self._most and key != OTHER:  # a key of that name is one of the others
                counted = self._shown[key] = {}
        counted[model, kind] = counted.get((model, kind), 0) + tokens

    def totals(self) -> dict[Labels, int]:
        """Return the tokens by key, model and kind."""
        if self._clock() - self._looked >= LOOK_S:
            self._looked = self._clock()
            self._elect()
        shown = {(key, *labels): n for key, counted in self._shown.items() for labels, n in counted.items()}
        return shown | {(OTHER, *labels): n for labels, n in self._other.items()}

    def _elect(self) -> None:
        recent = self._recent
        inside = sorted(self._shown, key=lambda key: recent.get(key, 0.0))
        outside = sorted((key for key in recent if key not in self._shown and key != OTHER), key=recent.__getitem__)
        for idle, busy in zip(inside, reversed(outside), strict=False):
            if recent[busy] <= CLEARLY * recent.get(idle, 0.0):
                break
            for labels, tokens in self._shown.pop(idle).items():
                self._other[labels] = self._other.get(labels, 0) + tokens
            self._shown[busy] = {}
        self._recent = {key: FORGET * tokens for key, tokens in recent.items() if FORGET * tokens >= 1}
