"""When requests begin in the open loop, and which key each belongs to."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence


def times(rate: float, burstiness: float, seed: int) -> Iterator[float]:
    """Yield the moments of arrival in seconds, without an end: gaps are gamma-distributed with mean 1/`rate`.

    Args:
        rate: requests a second.
        burstiness: shape of the gamma distribution, as in vLLM's benchmark: 1 is a Poisson process, less is bursty,
            more is steadier; infinite is a clock.
    """
    chance = random.Random(f"arrivals {seed}")
    at = 0.0
    while True:
        gap = 1.0 if burstiness == float("inf") else chance.gammavariate(burstiness, 1.0 / burstiness)
        at += gap / rate
        yield at


def bounded(arrivals: Iterator[float], requests: int, seconds: float) -> Iterator[tuple[int, float]]:
    """Yield (number, moment) of the first `requests` arrivals within `seconds`."""
    return enumerate(itertools.takewhile(lambda at: at < seconds, itertools.islice(arrivals, requests)))


def shared(count: int, shares: Sequence[float]) -> list[int]:
    """Split `count` users in proportion to `shares`: whole numbers, by largest remainder, that add up to `count`."""
    total = sum(shares)
    exact = [count * share / total for share in shares]
    whole = [int(part) for part in exact]
    by_remainder = sorted(range(len(shares)), key=lambda at: (whole[at] - exact[at], at))
    for at in by_remainder[: count - sum(whole)]:
        whole[at] += 1
    return whole


def picked(number: int, shares: Sequence[float], seed: int) -> int:
    """Return which key the request with this number belongs to: drawn in proportion to `shares`, always the same."""
    if len(shares) == 1:
        return 0
    return random.Random(f"key {seed} {number}").choices(range(len(shares)), shares)[0]
