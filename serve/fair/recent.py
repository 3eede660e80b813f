"""Which keys have asked for something of late."""

from __future__ import annotations

from collections import OrderedDict


class RecentKeys:
    """Keys by the time of their last request. Pure: the time is an argument."""

    def __init__(self, for_s: float) -> None:
        self._for_s = for_s
        self._last: OrderedDict[str, float] = OrderedDict()
        """The one that has been quiet longest first."""

    def saw(self, key: str, now: float) -> None:
        """Take note of a request."""
        self._last[key] = now
        self._last.move_to_end(key)

    def count(self, now: float) -> int:
        """Return how many keys there were in the last `for_s` seconds."""
        while self._last and now - next(iter(self._last.values())) > self._for_s:
            self._last.popitem(last=False)
        return len(self._last)
