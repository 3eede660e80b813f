"""Tokens into rows of one width: a stream of text cut into windows, or whole pieces packed side by side."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np

from jobs.tasks import IGNORED, Batch, Columns

Piece = tuple[list[int], list[int]]
"""Token ids, and as many labels: the token where it is learned, else -100."""


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


def documents(texts: Iterable[list[int]], end: int, width: int) -> list[Piece]:
    """Make pieces of documents, each with the end token; longer ones are cut into windows that overlap by one token."""
    pieces = []
    for text in texts:
        ids = [*text, end]
        for start in range(0, len(ids) - 1, width - 1):
            window = ids[start : start + width]
            pieces.append((window, [IGNORED, *window[1:]]))
    return pieces


def pack(pieces: list[Piece], width: int, padding: int, together: bool = True) -> Columns:
    """Pack pieces of (token ids, labels) whole into rows of `width`: by best fit, or one piece a row.

    Returns:
        input_ids, labels and position_ids (N, width) int32, and targets (N,) int32; positions restart with each piece.
    """
    bins = best_fit([len(ids) for ids, _ in pieces], width) if together else [[i] for i in range(len(pieces))]
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
            labels[row, start] = IGNORED  # nothing of its own comes before it
            position_ids[row, start:end] = np.arange(len(ids))
            start = end
        position_ids[row, start:] = np.arange(width - start)
    counted = (labels[:, 1:] != IGNORED).sum(axis=1).astype(np.int32)
    return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids, "targets": counted}


def joined(parts: Sequence[Columns]) -> Columns:
    """Put rows of windows and packed ones into one; a column that a part lacks is 0 in its rows.

    Args:
        parts: input_ids (N, width) and targets (N,), perhaps labels and position_ids (N, width) too. All int32.
    """
    names = dict.fromkeys(name for part in parts for name in part)
    filled = [{name: part.get(name, np.zeros_like(part["input_ids"])) for name in names} for part in parts]
    return {name: np.concatenate([part[name] for part in filled]) for name in names}


def complete(rows: Columns) -> Columns:
    """Give the windows among packed rows the labels and positions that they stand for.

    A row of windows has position 0 in its second place, which no packed one has.

    Args:
        rows: input_ids, labels and position_ids (B, width) and targets (B,), int32.
    """
    plain = rows["position_ids"][:, 1] == 0
    if not plain.any():
        return rows
    places = np.arange(rows["input_ids"].shape[1])
    own = np.where(places <= rows["targets"][:, None], rows["input_ids"], IGNORED)
    return {
        **rows,
        "labels": np.where(plain[:, None], own, rows["labels"]),
        "position_ids": np.where(plain[:, None], places, rows["position_ids"]).astype(np.int32),
    }


def separate(rows: Columns, padding: int) -> Columns:
    """Take packed rows apart: a row for each piece that has targets, as wide as the longest.

    Args:
        rows: input_ids, labels and position_ids (B, width), int32.

    Returns:
        input_ids and labels (K, longest), int32, K pieces.
    """
    pieces = []
    for ids, labels, positions in zip(rows["input_ids"], rows["labels"], rows["position_ids"], strict=True):
        starts = [*np.flatnonzero(positions == 0).tolist(), len(ids)]
        found = [(ids[start:end], labels[start:end]) for start, end in itertools.pairwise(starts)]
        pieces += [piece for piece in found if (piece[1][1:] != IGNORED).any()]
    longest = max(len(ids) for ids, _ in pieces)
    shape = (len(pieces), longest)
    separated = {"input_ids": np.full(shape, padding, np.int32), "labels": np.full(shape, IGNORED, np.int32)}
    for row, (ids, labels) in enumerate(pieces):
        separated["input_ids"][row, : len(ids)], separated["labels"][row, : len(ids)] = ids, labels
    return separated


def windows_batch(rows: Columns) -> Batch:
    """Return input_ids and labels (B, S) int64 of windows, shifted against each other.

    Args:
        rows: input_ids (B, S+1) and targets (B,), int32.
    """
    import torch

    ids = torch.from_numpy(rows["input_ids"].astype(np.int64))
    beyond = torch.arange(ids.shape[1] - 1) >= torch.from_numpy(rows["targets"].astype(np.int64))[:, None]
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:].masked_fill(beyond, IGNORED)}


def packed_batch(rows: Columns) -> Batch:
    """Return input_ids and labels (B, S) int64, shifted against each other, and position_ids where there are any.

    Args:
        rows: input_ids, labels and perhaps position_ids (B, S+1), int32.
    """
    import torch

    ends = {"input_ids": slice(None, -1), "labels": slice(1, None), "position_ids": slice(None, -1)}
    return {name: torch.from_numpy(rows[name].astype(np.int64))[:, end] for name, end in ends.items() if name in rows}


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
