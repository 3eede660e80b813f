"""A picture of how far chosen answers are ahead of rejected ones."""

from __future__ import annotations

import io

import numpy as np

from jobs.tasks.preference_loss import EDGES


def margins(counts: np.ndarray) -> bytes:
    """Draw the histogram of margins as a PNG: pairs in which the chosen answer is behind, and those where it is ahead.

    Args:
        counts: (42,) pairs below, between and above `EDGES`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width = EDGES[1] - EDGES[0]
    places = np.array([EDGES[0] - width, *EDGES]) + width / 2
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot(xlabel="margin of the chosen answer", ylabel="pairs held out")
    colours = ["tab:green" if place > 0 else "tab:red" for place in places]
    axes.bar(places, counts, width=0.9 * width, color=colours)
    axes.axvline(0, color="black", linewidth=1)
    used = np.flatnonzero(counts)
    if len(used):
        axes.set_xlim(min(places[used[0]], 0) - 2 * width, max(places[used[-1]], 0) + 2 * width)
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    return file.getvalue()
