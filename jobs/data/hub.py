"""Data sets of the hub (or in its client's layout on the disk), through the client `datasets`."""

from __future__ import annotations

import hashlib
from typing import Any

from cluster.errors import UserError
from jobs.data.classes import class_columns, said_of_names, unlabelled
from jobs.data.examples import Example, Rows, Source

VERSION = 2
"""Raise it when another example is made of the same row."""
BATCH = 1000


def open_hub(identifier: str) -> Source:
    """Open `owner/name` or `owner/name:split`; its digest is that of the rows themselves, whatever names them.

    Raises:
        UserError: it cannot be loaded.
    """
    name, _, split = identifier.partition(":")
    data = _as_files(_load(name, split or "train"))
    features = data.features.to_dict()
    classes = class_columns(features)

    def read() -> Rows:
        for number, row in enumerate(data):
            yield Example(unlabelled(dict(row), classes), f"hf://{identifier}: row {number}", padded=True)

    return Source(f"hf://{identifier}", _digest(data), read, f"hub {VERSION}", said_of_names(features), True)


def _load(name: str, split: str) -> Any:
    try:
        import datasets

        return datasets.load_dataset(name, split=split)
    except Exception as error:  # the hub's client raises many kinds; what matters is which data set and why
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"data: cannot load hf://{name}:{split}: {said}") from error


def _as_files(data: Any) -> Any:
    """Leave recordings as the files that they are: the client would decode them by a library of its own."""
    import datasets

    for name, feature in data.features.items():
        if isinstance(feature, datasets.Audio):
            data = data.cast_column(name, datasets.Audio(decode=False))
    return data


class _Sink:
    """A file that digests what is written to it."""

    closed = False

    def __init__(self) -> None:
        self.sha256 = hashlib.sha256()

    def write(self, content: Any) -> int:
        """Digest some bytes."""
        self.sha256.update(content)
        return len(content)

    def flush(self) -> None:
        """Do nothing: nothing is kept."""


def _digest(data: Any) -> str:
    """Return the SHA-256 (hex) of the rows and their columns' types, as Arrow writes them."""
    import pyarrow

    sink = _Sink()
    for table in data.with_format("arrow").iter(batch_size=BATCH):
        with pyarrow.ipc.new_stream(pyarrow.PythonFile(sink, "w"), table.schema) as writer:
            writer.write_table(table.combine_chunks())
    return sink.sha256.hexdigest()
