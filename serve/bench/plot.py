"""A run as a picture: distributions of latency, and what happened over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from serve.bench import record
from serve.bench.record import Record

BINS = 60
MOST_SERIES, ALL = 8, "each answer"


def write(records: Sequence[Record], told: dict[str, Any], path: Path) -> None:
    """Draw to a file in the format of its ending."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    good = [each for each in records if each.outcome == record.OK]
    bounds = told.get("slo", {}).get("bounds_s", {})
    firsts = {
        name: [each.ttft for each in good if name in (ALL, each.caller) and each.ttft is not None]
        for name in _series(good)
    }
    _cumulative(axes[0][0], "time to first token", firsts, bounds.get("ttft"))
    tpot = {ALL: [each.tpot for each in good if each.tpot is not None]}
    _cumulative(axes[0][1], "time per output token", tpot, bounds.get("tpot"))
    _cumulative(axes[1][0], "whole answer", {ALL: [each.e2e for each in good]}, bounds.get("e2e"))
    _over_time(axes[1][1], records)
    settings = told["settings"]
    load = f"{settings['users']} users" if settings["users"] else f"{settings['rate']:g} requests/s arriving"
    figure.suptitle(f"{settings['model']}, {settings['route']}, {load}, {len(good):,} of {len(records):,} completed")
    figure.savefig(path)


def per_second(moments: Sequence[float], weights: Sequence[float], end: float) -> tuple[Any, Any]:
    """Return (middles of bins in seconds, sum of the weights in a second) up to `end`."""
    sums, edges = np.histogram(moments, bins=BINS, range=(0.0, max(end, 1e-9)), weights=weights)
    return (edges[1:] + edges[:-1]) / 2, sums / (edges[1] - edges[0])


def _series(records: Sequence[Record]) -> list[str]:
    """Return the callers to draw apart; more than a picture can hold are drawn as one."""
    callers = sorted({each.caller for each in records})
    return callers if len(callers) <= MOST_SERIES else [ALL]


def _cumulative(axis: Any, title: str, series: dict[str, list[Any]], bound: float | None) -> None:
    for name, values in series.items():
        if values:
            axis.ecdf(np.asarray(values) * 1e3, label=name)
    if bound is not None:
        axis.axvline(bound * 1e3, color="grey", linestyle="--", label="bound")
    axis.set(title=title, xlabel="ms", ylabel="share of answers", ylim=(0, 1))
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize="small")


def _over_time(axis: Any, records: Sequence[Record]) -> None:
    """Draw the rates of answers by outcome."""
    end = max((each.ended for each in records), default=1.0)
    for kind in sorted({each.outcome for each in records}, key=lambda kind: (kind != record.OK, kind)):
        moments = [each.ended for each in records if each.outcome == kind]
        axis.plot(*per_second(moments, [1.0] * len(moments), end), label=kind)
    axis.set(title="answers by what became of them", xlabel="seconds", ylabel="in a second")
    axis.grid(alpha=0.3)
    if records:
        axis.legend(fontsize="small")
