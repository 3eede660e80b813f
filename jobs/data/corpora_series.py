"""A corpus of time series that is computed: made to be forecast, with what a forecaster may find known.

50 shops over 500 days, each value a level times a profile of the week, times a slow wave of 90 to 200 days, times
noise that hangs on for days: value = level · week[day mod 7] · (1 + a · sin(2π · day / period + phase)) · exp(e), where
e is autoregressive with coefficient 0.6 and innovations of deviation 0.05. The draws are PCG64's of seed 11.
"""

from __future__ import annotations

import hashlib
from datetime import date, timedelta

import numpy as np

from jobs.data.examples import Example, Rows, Source

SHOPS, DAYS = 50, 500
FIRST = date(2023, 1, 2)
VERSION = 1


def values() -> np.ndarray:
    """Return float64 (SHOPS, DAYS), rounded to hundredths."""
    draw = np.random.Generator(np.random.PCG64(11))
    day = np.arange(DAYS)
    made = []
    for _ in range(SHOPS):
        level, week = draw.uniform(20, 500), 1 + 0.4 * draw.uniform(-1, 1, 7)
        period, phase, height = draw.uniform(90, 200), draw.uniform(0, 2 * np.pi), draw.uniform(0.1, 0.4)
        noise, hangs = draw.normal(0, 0.05, DAYS), np.zeros(DAYS)
        for at in range(1, DAYS):
            hangs[at] = 0.6 * hangs[at - 1] + noise[at]
        made.append(level * week[day % 7] * (1 + height * np.sin(2 * np.pi * day / period + phase)) * np.exp(hangs))
    return np.round(np.array(made), 2)


def seasonal_series() -> Source:
    """Return the corpus in long format: series, time, target."""

    def read() -> Rows:
        for shop, series in enumerate(values()):
            for day, value in enumerate(series.tolist()):
                name, stamp = f"shop-{shop:02d}", (FIRST + timedelta(days=day)).isoformat()
                yield Example({"series": name, "time": stamp, "target": value}, f"{name} {stamp}")

    digest = hashlib.sha256(values().tobytes()).hexdigest()
    return Source("seasonal-series", digest, read, f"seasonal-series {VERSION}")
