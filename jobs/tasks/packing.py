"""Tokens into rows of one width: a stream of text cut into windows, or whole pieces packed side by side."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence

import numpy as np

from jobs.tasks import IGNORED, Columns


def windows(stream: np.ndarray, length: int, padding: int) -> Columns:
    """Cut a stream of tokens (T,) int32 into rows that overlap by one token, so that each is predicted once.

    Returns:
        input_ids (N, length+1) and targets (N,), int32; the last row is padded.
    """
    rows = max(1, math.ceil((len(stream) - 1) / length))
    padded = np.full(rows * length + 1, padding, dtype=np.int32)
    padded[: len(stream)] = stream
    targets = np.full(rows, length, dtype=np.int32)
    targets[-1] = len(stream) - 1 - (rows - 1) * length
    overlapping = np.lib.stride_tricks.sliding_window_view(padded, length + 1)[::length]
    return {"input_ids": overlapping.copy(), "targets": targets}


def pack(pieces: list[tuple[list[int], list[int]]], width: int, padding: int) -> Columns:
    """Pack pieces of (token ids, labels) whole into rows of `width`, by best fit.

    Returns:
        input_ids, labels and position_ids (N, width) int32, and targets (N,) int32; positions restart with each piece.
    """
    bins = best_fit([len(ids) for ids, _ in pieces], width)
    shape = (len(bins), width)
    input_ids = np.full(shape, padding, dtype=np.int32)
    labels = np.full(shape, IGNORED, dtype=np.int32)
    position_ids = np.zeros(shape, dtype=np.int32)
    for row, members in enumerate(bins):
        start = 0
        for member in members:
            ids, targets = pieces[member]
            end = start + len(ids)
            input_ids[row, start:end], labels[row, start:end] = ids, targets
            position_ids[row, start:end] = np.arange(len(ids))
            start = end
        position_ids[row, start:] = np.arange(width - start)
    counted = (labels[:, 1:] != IGNORED).sum(axis=1).astype(np.int32)
    return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids, "targets": counted}


def best_fit(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Pack items into bins of `width`: longest first, each into the fullest bin that takes it (best-fit decreasing).

    Returns:
        For each bin the indices of its items. Every item is in exactly one bin.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free width, bin), sorted
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        slot = bisect.bisect_left(room, (lengths[item], -1))
        if slot == len(room):
            bins.append([item])
            bisect.insort(room, (width - lengths[item], len(bins) - 1))
        else:
            free, index = room.pop(slot)
            bins[index].append(item)
            bisect.insort(room, (free - lengths[item], index))
    return bins
