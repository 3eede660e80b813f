"""Which values a trial has. Pure: the same sweep, number and trials before give the same values.

So nothing of a search has to be kept for a sweep that goes on: it follows from the trials that are written down.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.driver.sweep import tune
from jobs.driver.sweep.trials import Trial
from jobs.spec_sweep import FieldSpec, SweepSpec

TRIES = 200
"""Draws until a combination is found that no trial has had."""


def suggest(
    sweep: SweepSpec, number: int, before: Sequence[Trial], mode: str, first: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the values of the trial `number` (from 0), by the dotted paths of their fields.

    Args:
        before: all trials so far; optuna learns from those that have ended, and no combination is made twice.
        mode: "max" or "min": which way the metric is better.
        first: the values of the first trial, if they are not to be drawn.
    """
    if number == 0 and first is not None:
        return dict(first)
    if sweep.search == "grid":
        return point(sweep.fields, number)
    made = [trial.values for trial in before]
    for attempt in range(TRIES):
        seed = random.Random(f"{sweep.seed}/{number}/{attempt}").randrange(2**31)
        if sweep.search == "optuna":
            values = tune.suggested(sweep.fields, before, mode, seed)
        else:
            values = drawn(sweep.fields, seed)
        if values not in made:
            return values
    return next((left for left in _points(sweep.fields) if left not in made), values)


def drawn(fields: Mapping[str, FieldSpec], seed: int) -> dict[str, Any]:
    """Draw a value for each field, evenly from all that it may be."""
    draw = random.Random(seed)
    return {path: field.at(draw.random()) for path, field in fields.items()}


def point(fields: Mapping[str, FieldSpec], number: int) -> dict[str, Any]:
    """Return a combination of the grid by its number; the last field changes first."""
    return next(itertools.islice(_points(fields), number, None))


def _points(fields: Mapping[str, FieldSpec]) -> itertools.chain[dict[str, Any]]:
    """Return all combinations; none where a field has no end of values."""
    sizes = [field.size for field in fields.values()]
    ranges = [range(size) for size in sizes if size is not None]
    indices = itertools.product(*ranges) if len(ranges) == len(sizes) else iter(())
    named = ({path: field.nth(i) for (path, field), i in zip(fields.items(), at, strict=True)} for at in indices)
    return itertools.chain(named)
