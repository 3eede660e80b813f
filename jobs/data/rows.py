"""Encoded rows on disk: Arrow files, memory-mapped, read by row number."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from jobs.tasks import Columns


def write(path: Path, columns: Columns) -> int:
    """Write columns, each [N, …], as one Arrow IPC file; return the number of rows (N)."""
    arrays = [_to_arrow(np.ascontiguousarray(column)) for column in columns.values()]
    table = pa.record_batch(arrays, names=list(columns))
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_batch(table)
    return table.num_rows


class Rows:
    """Rows of several Arrow files, in order. Nothing is read before it is asked for.

    A column that only some of the files have is 0 in the rows of the others.
    """

    def __init__(self, files: Sequence[Path], beside: Sequence[Path] = ()) -> None:
        """Map the files; `beside` has a file with more columns of the same rows for each, or is empty."""
        self._shards = [_map(path) for path in files]
        for shard, path in zip(self._shards, beside, strict=False):
            shard.update(_map(path))
        self._fills: Columns = {}
        """Of each column, what a row has in it where its file has none."""
        for shard in self._shards:
            self._fills |= {n: np.zeros(c.shape[1:], c.dtype) for n, c in shard.items() if n not in self._fills}
        lengths = [len(next(iter(shard.values()))) for shard in self._shards]
        self._starts = np.cumsum([0, *lengths])
        self.targets: np.ndarray = (
            np.concatenate([shard["targets"] for shard in self._shards]) if lengths else np.zeros(0, dtype=np.int32)
        )
        """Terms of the loss in each row, int32 (N,)."""

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def columns(self) -> frozenset[str]:
        """The names of the columns of all files."""
        return frozenset(self._fills)

    def take(self, indices: np.ndarray) -> Columns:
        """Return the rows at `indices`, int64 [B], in that order, as new arrays [B, …]."""
        if len(self._shards) == 1:
            return {name: column[indices] for name, column in self._shards[0].items()}
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        return {
            name: np.stack(
                [
                    self._shards[s][name][i - self._starts[s]] if name in self._shards[s] else fill
                    for s, i in zip(shards, indices, strict=True)
                ]
            )
            for name, fill in self._fills.items()
        }


def _to_arrow(column: np.ndarray) -> pa.Array:
    return pa.array(column) if column.ndim == 1 else pa.FixedShapeTensorArray.from_numpy_ndarray(column)


def _map(path: Path) -> Columns:
    batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
    return {name: _to_numpy(batch.column(name)) for name in batch.schema.names}


def _to_numpy(array: pa.Array) -> np.ndarray:
    if isinstance(array, pa.FixedShapeTensorArray):
        return array.to_numpy_ndarray()
    return array.to_numpy(zero_copy_only=True)
