"""Which nodes measure their link at the same time: rounds in which no node is in two pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

MOST_ROUNDS = 31
"""So many other nodes each node is measured against, at most: all of them up to 32 nodes."""
Member = TypeVar("Member")


def rounds(members: Sequence[Member]) -> list[list[tuple[Member, Member]]]:
    """Arrange all pairs in as few rounds as can be: n - 1 for an even n, n for an odd one, of which each sits one out.

    The circle method: one member stays, the others move on by a place each round. Pure.
    """
    if len(members) < 2:
        return []
    circle: list[Member | None] = [*members, *([None] if len(members) % 2 else [])]
    half, arranged = len(circle) // 2, []
    for _ in range(len(circle) - 1):
        pairs = zip(circle[:half], reversed(circle[half:]), strict=True)
        arranged.append([(one, other) for one, other in pairs if one is not None and other is not None])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return arranged


def sampled(members: Sequence[Member], most_rounds: int = MOST_ROUNDS) -> tuple[list[list[tuple[Member, Member]]], int]:
    """Return the rounds that are held, and how many pairs are left out by that. Pure."""
    every = rounds(members)
    return every[:most_rounds], sum(len(pairs) for pairs in every[most_rounds:])
