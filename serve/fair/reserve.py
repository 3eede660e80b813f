"""How many slots are kept for keys that have used less than their share: as many as they turn out to need."""

from __future__ import annotations

SHORT_OF = 0.005
"""Of the requests of such keys, so many may find no slot free. One that finds none has one more kept; each that finds
one has this part of a slot less kept: the two balance where this part of them finds none."""
MOST = 0.4
"""Part of the slots that is kept at most, and at first. Of fewer slots than LEAST_SLOTS, none is."""
LEAST_SLOTS = 5


class Reserve:
    """The size of the reserve, in slots. Pure."""

    def __init__(self) -> None:
        self._kept = float("inf")
        """Beyond the most that may be kept until it is known how many slots there are."""

    def of(self, slots: float) -> int:
        """Return how many of so many slots are kept."""
        return round(self._bounded(self._kept, slots)) if slots >= LEAST_SLOTS else 0

    def asked(self, slots: float, found_one: bool) -> None:
        """Take note that a request of such a key came, and whether a slot was free for it."""
        kept = self._bounded(self._kept, slots)
        self._kept = self._bounded(kept - SHORT_OF if found_one else kept + 1, slots)

    def _bounded(self, kept: float, slots: float) -> float:
        return max(1.0, min(kept, MOST * slots))
