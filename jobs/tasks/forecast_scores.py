"""How good forecasts are: quantile loss, MASE, sMAPE, coverage, and a picture of a few with their bands."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.tasks.scores import array

if TYPE_CHECKING:
    import torch


def pinball(found: torch.Tensor, future: torch.Tensor, known: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Sum twice the quantile loss, averaged over the Q quantiles, over the known steps: () fp32.

    With one quantile, 0.5, it is the absolute error (Koenker and Bassett 1978).

    Args:
        found: (B, H, Q).
        future: (B, H).
        known: (B, H), 1 where there is a value.
        levels: (Q,).
    """
    import torch

    error = future.unsqueeze(-1) - found
    each = torch.maximum(levels * error, (levels - 1) * error)
    return (2 * each.mean(-1) * known).sum()


def sums(
    found: torch.Tensor, future: torch.Tensor, known: torch.Tensor, levels: Sequence[float], scale: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Sum what is measured of forecasts, each (), over rows: absolute errors over scale, sMAPE, steps in the band.

    Args:
        found: (B, H, Q) in order, in the unit of the data; Q is 1 for a forecast without a band.
        future, known: (B, H).
        levels: of the quantiles, the middle one is 0.5.
        scale: (B,), what errors are divided by for MASE; rows where it is 0 are left out.
    """
    import torch

    median = found[..., len(levels) // 2] if found.shape[-1] > 1 else found[..., 0]
    steps = known.sum(-1).clamp(min=1)
    error = (future - median).abs() * known
    both = (future.abs() + median.abs()).clamp(min=1e-12)
    counted = (scale > 0) & (known.sum(-1) > 0)
    mase = (error.sum(-1) / steps)[counted] / scale[counted]
    smape = (200 * error / both).sum(-1) / steps
    within = (found[..., 0] <= future) & (future <= found[..., -1]) & (known > 0)
    return {
        "mase": mase.double().sum(),
        "mase_rows": counted.sum(),
        "smape": smape.double().sum(),
        "smape_rows": (known.sum(-1) > 0).sum(),
        "within": within.sum(),
        "nominal": known.sum().double() * (levels[-1] - levels[0]) if len(levels) > 1 else torch.zeros(()),
    }


def picture(drawn: np.ndarray, names: Sequence[str], context: int, horizon: int, levels: Sequence[float]) -> bytes:
    """Draw forecasts with their bands over what came, as a PNG.

    Args:
        drawn: (S, 1 + 2 C + 2 H + H Q): how many were added, context, observed, future, known, quantiles.
        names: of the S series.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    there = [(name, row) for name, row in zip(names, drawn, strict=False) if row[0] > 0]
    figure = Figure(figsize=(10, 2.2 * max(1, len(there))), layout="constrained")
    for place, (name, row) in enumerate(there, 1):
        axes = figure.add_subplot(len(there), 1, place, title=name)
        _draw(axes, row[1:] / row[0], context, horizon, levels)
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    return file.getvalue()


def drawn_of(flat: Mapping[str, Any], series: int) -> np.ndarray:
    """Return what `picture` takes, (S, …), of added-up sums, for S series."""
    found = array(flat, "drawn")
    return found.reshape(-1, len(found) // max(1, series)) if len(found) else np.zeros((0, 1))


def _draw(axes: Any, row: np.ndarray, context: int, horizon: int, levels: Sequence[float]) -> None:
    bounds = np.cumsum([context, context, horizon, horizon])
    past, observed, future, known, found = np.split(row, bounds)
    quantiles = found.reshape(horizon, len(levels))
    before, ahead = np.arange(-context, 0), np.arange(horizon)
    axes.plot(before, np.where(observed > 0.5, past, np.nan), color="black", linewidth=1)
    axes.plot(ahead, np.where(known > 0.5, future, np.nan), color="black", linewidth=1, label="what came")
    for outer in range(len(levels) // 2):
        axes.fill_between(ahead, quantiles[:, outer], quantiles[:, -1 - outer], color="tab:blue", alpha=0.15, lw=0)
    band = f"median, band from {levels[0]:g} to {levels[-1]:g}"
    axes.plot(ahead, quantiles[:, len(levels) // 2], color="tab:blue", label=band)
    axes.legend(loc="upper left", fontsize=7)
