"""Pictures of a sweep: how far it came with each trial, the metric over each field, and all fields side by side."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jobs.driver.sweep.trials import Trial, best, better
from jobs.spec_sweep import FieldSpec, SweepSpec

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"finished": "tab:blue", "stopped": "tab:orange", "out of time": "tab:grey"}
MOST_FIELDS = 12
"""More panels nobody could read."""


def pictures(trials: Sequence[Trial], sweep: SweepSpec, mode: str) -> dict[str, bytes]:
    """Return PNGs by their names; none where no trial has measured anything.

    Args:
        mode: "max" or "min": which way the metric is better.
    """
    measured = [trial for trial in trials if trial.value is not None and math.isfinite(trial.value)]
    if not measured:
        return {}
    return {"trials.png": _panels(measured, sweep, mode), "parallel.png": _parallel(measured, sweep, mode)}


def _panels(trials: Sequence[Trial], sweep: SweepSpec, mode: str) -> bytes:
    from matplotlib.figure import Figure

    fields = list(sweep.fields.items())[:MOST_FIELDS]
    columns = min(3, len(fields) + 1)
    lines = math.ceil((len(fields) + 1) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * lines), layout="constrained")
    history, *others = [figure.add_subplot(lines, columns, index + 1) for index in range(len(fields) + 1)]
    history.set(xlabel="trial", ylabel=sweep.metric)
    _scatter(history, [trial.number + 1 for trial in trials], trials)
    history.step(*_running_best(trials, mode), where="post", color="tab:green", label="best so far")
    for axes, (path, field) in zip(others, fields, strict=True):
        _scatter(axes, [_shown(field, trial.values[path]) for trial in trials], trials)
        axes.set(xlabel=path, ylabel=sweep.metric, xscale="log" if field.log else "linear")
    history.legend(fontsize="small")
    return _png(figure)


def _scatter(axes: Axes, places: Sequence[Any], trials: Sequence[Trial]) -> None:
    for ended, colour in COLOURS.items():
        chosen = [(at, trial.value) for at, trial in zip(places, trials, strict=True) if trial.ended == ended]
        if chosen:
            axes.scatter([at for at, _ in chosen], [value for _, value in chosen], 22, color=colour, label=ended)


def _running_best(trials: Sequence[Trial], mode: str) -> tuple[list[int], list[float]]:
    """Return, for each trial that finished, the best metric up to it."""
    places: list[int] = []
    values: list[float] = []
    for trial in trials:
        if trial.is_whole and trial.value is not None:
            places.append(trial.number + 1)
            values.append(trial.value if not values or better(mode, trial.value, values[-1]) else values[-1])
    return places, values


def _parallel(trials: Sequence[Trial], sweep: SweepSpec, mode: str) -> bytes:
    """Draw each trial as a line across all fields and the metric, the best one thick."""
    from matplotlib.figure import Figure

    fields = list(sweep.fields.items())[:MOST_FIELDS]
    values = [trial.value for trial in trials if trial.value is not None]
    low, high = min(values), max(values)
    figure = Figure(figsize=(2.2 * (len(fields) + 1) + 1, 4), layout="constrained")
    axes = figure.add_subplot(xticks=range(len(fields) + 1), yticks=[], ylim=(-0.08, 1.08))
    axes.set_xticklabels([*(path.rpartition(".")[2] for path, _ in fields), sweep.metric])
    chosen = best(trials, mode)
    for trial in trials:
        assert trial.value is not None, "only what has measured is drawn"
        heights = [_height(field, trial.values[path]) for path, field in fields]
        heights.append((trial.value - low) / (high - low) if high > low else 0.5)
        is_best = chosen is not None and trial.number == chosen.number
        colour = "tab:green" if is_best else COLOURS.get(trial.ended or "", "tab:grey")
        axes.plot(heights, color=colour, linewidth=3 if is_best else 1, alpha=1 if is_best else 0.6)
    for place, (_, field) in enumerate(fields):
        _ends(axes, place, *_names(field))
    _ends(axes, len(fields), f"{low:.4g}", f"{high:.4g}")
    return _png(figure)


def _ends(axes: Axes, place: int, low: str, high: str) -> None:
    axes.axvline(place, color="black", linewidth=0.6)
    axes.text(place, -0.02, low, ha="center", va="top", fontsize="small")
    axes.text(place, 1.02, high, ha="center", va="bottom", fontsize="small")


def _shown(field: FieldSpec, value: Any) -> Any:
    numbers = field.choices is None or all(type(choice) in (int, float) for choice in field.choices)
    return value if numbers else str(value)


def _height(field: FieldSpec, value: Any) -> float:
    """Return where a value lies between the ends of its field, from 0 to 1."""
    if field.choices is not None:
        return field.choices.index(value) / max(1, len(field.choices) - 1)
    low, high = field.ends
    if field.log:
        return math.log(value / low) / math.log(high / low)
    return float((value - low) / (high - low))


def _names(field: FieldSpec) -> tuple[str, str]:
    if field.choices is not None:
        return str(field.choices[0]), str(field.choices[-1])
    low, high = field.ends
    return f"{low:g}", f"{high:g}"


def _png(figure: Figure) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    written = io.BytesIO()
    FigureCanvasAgg(figure).print_png(written)
    return written.getvalue()
