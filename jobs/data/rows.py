"""Encoded rows on disk: Arrow files, memory-mapped, read by row number."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa

from jobs.tasks import Columns

MAPPED = 24_000
"""So many files are mapped at a time, of the rows to train on and of those held out: Linux lets a process have 65,530
maps, unless told otherwise. Others are mapped again when they are read, which takes some tenths of a millisecond."""


def write(path: Path, columns: Columns) -> int:
    """Write columns, each [N, …], as one Arrow IPC file; return the number of rows (N)."""
    arrays = [_to_arrow(np.ascontiguousarray(column)) for column in columns.values()]
    table = pa.record_batch(arrays, names=list(columns))
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_batch(table)
    return table.num_rows


class Rows:
    """Rows of several Arrow files, in order. Nothing is kept of a row, and nothing is read before it is asked for.

    A column that only some of the files have is 0 in the rows of the others. Of a file its place and its length are
    kept, and a map of it while it is one of the `mapped` that were read last.
    """

    def __init__(
        self,
        files: Sequence[Path],
        beside: Sequence[Path] = (),
        mapped: int = MAPPED,
        before: Path | None = None,
    ) -> None:
        """Look at the files.

        Args:
            beside: for each a file with more columns of the same rows, or empty.
            before: the folder that the files are in until they are in theirs, if they are still being made.
        """
        self._files = [files, beside] if beside else [files]
        self._before = before
        self._shard = lru_cache(maxsize=mapped // len(self._files))(self._map)  # safe where two threads read
        self._fills: Columns = {}
        """Of each column, what a row has in it where its file has none."""
        lengths = []
        for number in range(len(files)):
            shard = self._shard(number)
            self._fills |= {n: np.zeros(c.shape[1:], c.dtype) for n, c in shard.items() if n not in self._fills}
            lengths.append(len(next(iter(shard.values()))))
        self._starts = np.cumsum([0, *lengths])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def columns(self) -> frozenset[str]:
        """The names of the columns of all files."""
        return frozenset(self._fills)

    def take(self, indices: np.ndarray) -> Columns:
        """Return the rows at `indices`, int64 [B], in that order, as new arrays [B, …]."""
        order, parts = self._by_file(indices)
        places = np.empty_like(order)
        places[order] = np.arange(len(order))
        return {name: _gathered(parts, name, fill)[places] for name, fill in self._fills.items()}

    def targets(self, indices: np.ndarray) -> int:
        """Count the terms of the loss in the rows at `indices`, int64 [B]; no other column of them is read."""
        return int(_gathered(self._by_file(indices)[1], "targets", self._fills["targets"]).sum())

    def _by_file(self, indices: np.ndarray) -> tuple[np.ndarray, list[tuple[Columns, np.ndarray]]]:
        """Sort `indices`, int64 [B], by file.

        Returns:
            How they were sorted, int64 [B], and of each file of theirs the columns and the rows in it, int64 [b].
        """
        numbers = np.searchsorted(self._starts, indices, side="right") - 1
        order = np.argsort(numbers, kind="stable")
        files, begins = np.unique(numbers[order], return_index=True)
        rows = np.split((indices - self._starts[numbers])[order], begins)[1:]
        return order, [(self._shard(int(file)), within) for file, within in zip(files, rows, strict=True)]

    def _map(self, number: int) -> Columns:
        return {name: column for files in self._files for name, column in self._mapped(files[number]).items()}

    def _mapped(self, path: Path) -> Columns:
        """Map a file where it is: it may get into its folder at any moment, and never leaves it."""
        for place in (path, self._before / path.name) if self._before else ():
            with suppress(FileNotFoundError):
                return _map(place)
        return _map(path)


def _gathered(parts: list[tuple[Columns, np.ndarray]], name: str, fill: np.ndarray) -> np.ndarray:
    """Return a column of rows of several files, one behind the other, as a new array [B, …]."""
    of = [
        shard[name][rows] if name in shard else np.broadcast_to(fill, (len(rows), *fill.shape)) for shard, rows in parts
    ]
    return np.concatenate([fill[None][:0], *of])


def _to_arrow(column: np.ndarray) -> pa.Array:
    return pa.array(column) if column.ndim == 1 else pa.FixedShapeTensorArray.from_numpy_ndarray(column)


def _map(path: Path) -> Columns:
    batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
    return {name: _to_numpy(batch.column(name)) for name in batch.schema.names}


def _to_numpy(array: pa.Array) -> np.ndarray:
    if isinstance(array, pa.FixedShapeTensorArray):
        return array.to_numpy_ndarray()
    return array.to_numpy(zero_copy_only=True)
