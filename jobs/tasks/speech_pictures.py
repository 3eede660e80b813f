"""Pictures of what was heard: spectrograms of held-out recordings, with each symbol where the model heard it."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np

BINS, COLUMNS, SAID = 24, 96, 48
"""A picture's height and width, and how many symbols of its transcript are kept: small, for each row has one."""
DRAWN = 6
NOTHING = -1


def cells(mel: np.ndarray) -> np.ndarray:
    """Return a spectrogram (F, M) as a picture (BINS, COLUMNS) uint8, its time stretched to the width."""
    time = np.linspace(0, len(mel) - 1, COLUMNS).round().astype(int)
    height = np.linspace(0, mel.shape[1] - 1, BINS).round().astype(int)
    picture = mel[time][:, height].T
    return ((np.clip(picture, -3, 3) + 3) / 6 * 255).astype(np.uint8)


def heard(onsets: Sequence[tuple[int, int]], frames: int) -> np.ndarray:
    """Return which symbol begins in each column (COLUMNS,) int16; NOTHING where none does."""
    row = np.full(COLUMNS, NOTHING, np.int16)
    for frame, symbol in onsets:
        row[min(COLUMNS - 1, frame * COLUMNS // max(frames, 1))] = symbol
    return row


def said(label: Sequence[int]) -> np.ndarray:
    """Return the first symbols of a transcript, (SAID,) int16, filled up with NOTHING."""
    row = np.full(SAID, NOTHING, np.int16)
    row[: len(label)] = label[:SAID]
    return row


def drawn(pictures: np.ndarray, heard_at: np.ndarray, transcripts: np.ndarray, symbols: Sequence[str]) -> bytes:
    """Draw recordings as a PNG, those first whose text was heard otherwise.

    Args:
        pictures: (N, BINS, COLUMNS) uint8.
        heard_at: (N, COLUMNS) int16.
        transcripts: (N, SAID) int16.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    wrong = [_text(row, symbols) != _text(other, symbols) for row, other in zip(heard_at, transcripts, strict=True)]
    order = sorted(range(len(wrong)), key=lambda at: not wrong[at])
    shown = order[: DRAWN // 2] + order[::-1][: DRAWN // 2]
    shown = list(dict.fromkeys(shown))
    figure = Figure(figsize=(8, 1.9 * len(shown)), layout="constrained")
    for place, at in enumerate(shown):
        axes = figure.add_subplot(len(shown), 1, place + 1)
        axes.imshow(pictures[at], origin="lower", aspect="auto", cmap="magma", vmin=0, vmax=255)
        axes.set(xticks=[], yticks=[], ylabel="mel")
        axes.set_title(f"said {_text(transcripts[at], symbols)!r}, heard {_text(heard_at[at], symbols)!r}", fontsize=9)
        for column, symbol in enumerate(heard_at[at]):
            if symbol != NOTHING:
                axes.axvline(column, color="white", linewidth=0.8)
                axes.text(column + 0.4, BINS - 4, symbols[symbol].replace("$", r"\$"), color="white", fontsize=9)
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    return file.getvalue()


def _text(row: np.ndarray, symbols: Sequence[str]) -> str:
    return " ".join("".join(symbols[symbol] for symbol in row if symbol != NOTHING).split())
