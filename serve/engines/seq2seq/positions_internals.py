"""Positions row by row for decoders that look them up in a table (BART, Marian, Pegasus, …).

Transformers 5.23 takes the position of a new token from the length of the cache, the same for all rows; here rows are
at different places. Their module `embed_positions`, a table with an `offset` or none, is put behind one that is told
where each row is. To go when the decoders of encoder-decoder models take `position_ids`, as decoders alone do.
serve/engines/seq2seq/check.py sees whether that gives what the model itself gives.
"""

from __future__ import annotations

from typing import Any

import torch

from cluster.internals import Internal

ENTRIES = (
    Internal(
        "transformers' embed_positions of decoders (offset, weight)",
        "new tokens of rows that are at different places of their texts; the models take no position_ids",
        "batched texts of BART, Marian and their kin are wrong from the second token on",
        "decoders of encoder-decoder models take position_ids",
    ),
)


class RowPositions(torch.nn.Module):
    """A table of positions that is looked up by `rows` where that is set."""

    def __init__(self, table: Any) -> None:
        super().__init__()
        self.table = table
        self.rows: torch.Tensor | None = None
        """Where each row's new token is, (R,) int64; None: the model decides."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return vectors (R, 1, H) of the rows' positions, or what the model's own table gives."""
        if self.rows is None:
            return self.table(*args, **kwargs)
        at = self.rows[:, None] + getattr(self.table, "offset", 0)
        return torch.nn.functional.embedding(at, self.table.weight)


def placed(model: Any) -> RowPositions | None:
    """Put a RowPositions into the decoder of a model; None where it has no table of positions."""
    decoder = model.get_decoder()
    table = getattr(decoder, "embed_positions", None)
    if table is None or not hasattr(table, "weight"):
        return None
    decoder.embed_positions = RowPositions(table)
    rows: RowPositions = decoder.embed_positions
    return rows
