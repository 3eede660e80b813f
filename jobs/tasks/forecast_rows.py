"""Series as rows: windows to learn from, ends to predict, and what the seasonal naive forecast makes of these.

Seasonal naive says that a step will be as the same step of the last season was; MASE is the mean absolute error divided
by that of this forecast, one step of it, within the history (Hyndman and Koehler 2006).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from jobs.tasks import Columns
from jobs.tasks.series import Series

SHORTENED = 4
"""Every so many windows of a series, one has a shorter context, so that short histories are no news to a model …"""
SHARES = (1 / 8, 1 / 4, 1 / 2, 3 / 4)
"""… of these shares of the whole, in turn."""


@dataclass(frozen=True)
class Shape:
    """What decides how series become rows."""

    context: int
    horizon: int
    season: int
    stride: int
    drawn: Sequence[str]
    """The names of the series that are drawn."""
    ends: Mapping[str, float] = field(default_factory=dict)
    """The last moment that was learned of each series, by its name."""


def to_learn(chunk: Sequence[Series], shape: Shape) -> Columns:
    """Return the windows of series, and what is counted.

    context (N, C) and future (N, H) float32, observed (N, C) and known (N, H) uint8, targets (N,) int32.
    """
    parts = [
        _window(series.values, at, shape, reach(number, shape.context))
        for series in chunk
        for number, at in enumerate(starts(len(series.values), shape))
    ]
    parts = [part for part in parts if part["targets"] and part["observed"].any()]
    empty: Columns = {
        "context": np.zeros((0, shape.context), np.float32),
        "observed": np.zeros((0, shape.context), np.uint8),
        "future": np.zeros((0, shape.horizon), np.float32),
        "known": np.zeros((0, shape.horizon), np.uint8),
        "targets": np.zeros(0, np.int32),
    }
    rows: Columns = {key: np.stack([part[key] for part in parts]) for key in empty} if parts else empty
    return {**rows, "short": np.array([not starts(len(series.values), shape) for series in chunk]), **_odd(chunk)}


def to_predict(chunk: Sequence[Series], shape: Shape) -> Columns:
    """Return a row for the end of each series.

    Besides what rows to learn from have: naive (N, H) float32, the seasonal naive forecast, scale (N,) float32, its
    mean absolute error within the history, 0 where there is none, and drawn (N,) int32, a picture's place, from 1.
    """
    parts = [_end(series, shape) for series in chunk]
    rows: Columns = {key: np.stack([part[key] for part in parts]) for key in parts[0]}
    told = np.array([_is_told(series, shape) for series in chunk])
    return {**rows, "flat": rows["scale"] == 0, "told": told, **_odd(chunk)}


def starts(length: int, shape: Shape) -> list[int]:
    """Return where the futures of a series' windows begin, from the end backwards, every `stride` steps.

    The contexts are whole where the series is long enough for it, else at least half of what there is.
    """
    last = length - shape.horizon
    return list(range(last, max(1, min(shape.context, last // 2)) - 1, -shape.stride))


def reach(number: int, context: int) -> int:
    """Return how many steps the context of a series' window, counted from 0, reads."""
    turn, rest = divmod(number, SHORTENED)
    return context if rest < SHORTENED - 1 else max(1, round(context * SHARES[turn % len(SHARES)]))


def naive(history: np.ndarray, season: int, horizon: int) -> np.ndarray:
    """Return the seasonal naive forecast of a history (n,) with NaN for missing values: float64 (horizon,).

    Where the last season lacks a step, an earlier one's is taken, else the last value that there is.
    """
    there = history[~np.isnan(history)]
    last = there[-1] if len(there) else 0.0
    found = np.full(horizon, last)
    for ahead in range(horizon):
        phase = (len(history) + ahead) % season
        same = history[phase::season] if phase < len(history) else np.zeros(0)
        same = same[~np.isnan(same)]
        if len(same):
            found[ahead] = same[-1]
    return found


def naive_error(history: np.ndarray, season: int) -> float:
    """Return the mean absolute error of one season's difference within a history (n,), 0 where there is no pair."""
    errors = np.abs(history[season:] - history[:-season]) if len(history) > season else np.zeros(0)
    errors = errors[~np.isnan(errors)]
    return float(errors.mean()) if len(errors) else 0.0


def padded(history: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the latest values, float32 (context,), 0 where one is missing, and which are there, uint8 (context,)."""
    latest = history[-context:]
    values, observed = np.zeros(context, np.float32), np.zeros(context, np.uint8)
    if len(latest):
        values[-len(latest) :] = np.nan_to_num(latest)
        observed[-len(latest) :] = ~np.isnan(latest)
    return values, observed


def _odd(chunk: Sequence[Series]) -> Columns:
    """Return which of N series lack most of their values, or lose them to rounding: (N,) bool."""
    return {
        "sparse": np.array([series.is_sparse for series in chunk]),
        "coarse": np.array([series.is_coarse for series in chunk]),
    }


def _is_told(series: Series, shape: Shape) -> bool:
    """Tell whether the steps that are to be predicted, or the first of them, were learned."""
    first = series.moment_of(len(series.values) - shape.horizon)
    return first is not None and first <= shape.ends.get(series.name, -np.inf)


def _window(values: np.ndarray, at: int, shape: Shape, reach_: int) -> Columns:
    context, observed = padded(values[max(0, at - reach_) : at], shape.context)
    future = values[at : at + shape.horizon]
    known = (~np.isnan(future)).astype(np.uint8)
    return {
        "context": context,
        "observed": observed,
        "future": np.nan_to_num(future).astype(np.float32),
        "known": known,
        "targets": known.sum(dtype=np.int32),
    }


def _end(series: Series, shape: Shape) -> Columns:
    at = len(series.values) - shape.horizon
    history = series.values[:at]
    place = shape.drawn.index(series.name) + 1 if series.name in shape.drawn else 0
    return {
        **_window(series.values, at, shape, shape.context),
        "naive": naive(history, shape.season, shape.horizon).astype(np.float32),
        "scale": np.array(naive_error(history, shape.season), dtype=np.float32),
        "drawn": np.array(place, dtype=np.int32),
    }
