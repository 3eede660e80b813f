"""The largest micro-batch that fits, from as few trials as will do. Pure.

Only sizes count that a rank's rows of a step divide into evenly: of 32 rows, 20 at a time take two passes as 16 do.

A CPU's memory is never tried out by running out of it. Nothing is tried that is not sure to fit by what a rows took,
a ≤ b, in one of two ways; only of one row nothing is known before.

    held + (peak - held) · b/a          every part of a pass grows no faster than its rows, and what it held before it
                                        began, gradients of the pass before, does not grow at all
    peak + each · (b - a)               what a row more may add: twice what the forward pass keeps of one (as much
                                        again for gradients and what comes and goes), a quarter more than it added
                                        between the last two sizes, half more than the plan says, whichever is most

The second is for peaks of another moment, as when gradients are summed. Where layers are computed again, the forward
pass keeps too little to tell, so that it takes a plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple


class Took(NamedTuple):
    """Bytes beyond those at the beginning, on the rank that took most."""

    held: int
    """Before the pass over the rows."""
    kept: int
    """When it turned from forward to backward."""
    peak: int


Tried = Mapping[int, Took | None]
"""Rows → what passes over them took; None: there was not enough."""


@dataclass(frozen=True)
class Known:
    """What is known before anything is tried."""

    of: int
    """A rank's rows of a step."""
    budget: int
    """Bytes that passes may take."""
    planned: int = 0
    """The most rows that the plan expects to fit; 0: it expects nothing."""
    each: int = 0
    """Bytes of a row by the plan; 0: not known."""
    again: bool = False
    """Layers are computed again in the backward pass."""


LEAP = 8
"""So many times the rows at most are tried next, whatever a plan expects: what is measured of few rows is not exact."""
AMPLE = 4
"""What the plan says needs no more than so small a part of the memory is taken without a trial."""


def even(rows: int, of: int) -> int:
    """Return the fewest rows at a time that need no more passes than `rows` do."""
    passes = -(-of // min(rows, of))
    return -(-of // passes)


def best(tried: Tried, budget: int) -> int:
    """Return the most rows that were found to fit; 1 where none was, since fewer there are not."""
    return max((rows for rows, took in tried.items() if _fits(took, budget)), default=1)


def following(tried: Tried, known: Known) -> int | None:
    """Return how many rows to try next; None: the largest is found.

    One row, two rows, then twice as many, or up to LEAP times as many where the plan expects them to fit, as long as
    they are sure to; then between what fits and what does not.
    """
    if 1 not in tried:
        return 1
    of, budget = known.of, known.budget
    fitting = best(tried, budget)
    if not _fits(tried[fitting], budget):
        return None
    larger = {rows: took for rows, took in tried.items() if rows > fitting}
    failing = min((rows for rows, took in larger.items() if not _fits(took, budget)), default=of + 1)
    allowed = min(of, failing - 1, sure(fitting, tried, known))
    if failing <= of:
        return _between(fitting, failing, allowed, of)
    wanted = max(2 * fitting, min(known.planned, LEAP * fitting if fitting > 1 else 2))
    rows = even(min(wanted, allowed), of)
    return rows if rows > fitting else None


def _fits(took: Took | None, budget: int) -> bool:
    return took is not None and took.peak <= budget


def sure(fitting: int, tried: Tried, known: Known) -> int:
    """Return how many rows are sure to fit, by what is measured of so many and of fewer."""
    measured = {rows: took for rows, took in tried.items() if took is not None and rows <= fitting}
    took, held = measured[fitting], min(each.held for each in measured.values())
    growing, room = took.peak - held, known.budget - took.peak
    by_share = fitting * (known.budget - held) // growing if growing > 0 else LEAP * fitting
    if known.again and not known.each:
        return by_share
    each = max(2 * (took.kept - took.held) / fitting, 1.25 * _slope(measured), 1.5 * known.each)
    return max(by_share, fitting + math.floor(room / each) if each > 0 else LEAP * fitting)


def _slope(measured: Mapping[int, Took]) -> float:
    """Return the bytes that a row added between the two largest sizes; 0 where there are no two."""
    *_, (few, before), (many, after) = [(0, None), (0, None), *sorted(measured.items())]
    return 0.0 if before is None or after is None else (after.peak - before.peak) / (many - few)


def _between(fitting: int, failing: int, allowed: int, of: int) -> int | None:
    """Return a size near the middle of what fits and what does not; None: there is none that is even."""
    low = fitting
    while failing - low > 1:
        middle = (low + failing) // 2
        if (rows := even(min(middle, allowed), of)) > fitting:
            return rows
        low = middle
    return None


def expected(growth: Callable[[int], int], budget: int, of: int) -> int:
    """Return the most rows that a plan expects to fit, 0 where not even one does.

    Args:
        growth: bytes that passes over so many rows take; never less for more rows.
    """
    low, high = 0, of + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if growth(middle) <= budget else (low, middle)
    return even(low, of) if low else 0
