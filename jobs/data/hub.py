"""Data sets of the hub (or in its client's layout on the disk), through the client `datasets`.

The client fetches a data set whole, into Arrow files that it maps into memory; where they are many bytes, they are read
in parts, by any process that sees them. What is not to be fetched whole is named by its files, `hf://datasets/…`
(jobs/data/remote.py).
"""

from __future__ import annotations

import hashlib
import re
from functools import partial
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from jobs.data.classes import class_columns, said_of_names, unlabelled
from jobs.data.examples import Cut, Example, Rows, Source
from jobs.data.ranges import RANGE_BYTES
from jobs.data.remote import HUB

VERSION = 2
"""Raise it when another example is made of the same row."""
BATCH = 1000
SPLIT = "train"
"""What is read of a data set where no split is named."""


def open_hub(identifier: str, range_bytes: int = RANGE_BYTES) -> Source:
    """Open `owner/name` or `owner/name:split`; its digest is that of the rows themselves, whatever names them.

    Args:
        range_bytes: a larger one is read in parts of about so many bytes.

    Raises:
        UserError: it cannot be loaded.
    """
    name, _, split = identifier.partition(":")
    data = _as_files(_load(name, split or SPLIT))
    features = data.features.to_dict()
    files = tuple(str(file["filename"]) for file in data.cache_files)
    size = sum(Path(file).stat().st_size for file in files)
    cuts = _cuts(len(data), size, range_bytes) if files else ()
    cuts = cuts if cuts and len(data) == len(_whole(files)) else ()  # of a slice (train[90%:]) the files hold more
    return Source(
        f"hf://{identifier}",
        _digest(data),
        lambda: _rows(data, identifier, 0),
        f"hub {VERSION}",
        said_of_names(features),
        True,
        origin=files[0] if cuts else "",
        size=size if cuts else None,
        cuts=cuts,
        read_cut=partial(_part, files, identifier) if cuts else None,
    )


def origin_of(where: str) -> str:
    """Return a data set's name as it is told from others: with its split, the one that is read where none is named.

    The hub finds a data set whatever the case of its letters.
    """
    name, _, split = where.removeprefix("hf://").partition(":")
    return f"hf://{name.lower()}:{split or SPLIT}"


def repository(where: str) -> str | None:
    """Return the `owner/name` of what is read from the hub, a split of a data set or files of one; None of all else."""
    if not where.startswith("hf://"):
        return None
    owner, name, *_ = [*where.removeprefix(f"{HUB}/").removeprefix("hf://").split("/"), ""]
    return f"{owner}/{re.split('[@:]', name)[0]}".lower()


def _cuts(rows: int, size: int, range_bytes: int) -> tuple[Cut, ...]:
    """Cut so many rows, of `size` bytes in all, into parts of at least `range_bytes`; none where they are one part."""
    each = max(1, -(-rows * range_bytes // max(size, 1)))
    parts = [(start, min(start + each, rows)) for start in range(0, rows, each)]
    cuts = tuple(Cut(start, end, start, -(-size * (end - start) // rows)) for start, end in parts)
    return cuts if len(cuts) > 1 else ()


def _part(files: tuple[str, ...], identifier: str, cut: Cut) -> Rows:
    """Read some rows out of the client's files.

    Raises:
        UserError: they cannot be read.
    """
    try:
        data = _whole(files)
    except OSError as error:
        raise UserError(f"data: cannot read hf://{identifier} on: {error}") from error
    return _rows(_as_files(data.select(range(cut.start, cut.end))), identifier, cut.start)


def _whole(files: tuple[str, ...]) -> Any:
    """Return all that the client's files hold, as a data set."""
    import datasets

    return datasets.concatenate_datasets([datasets.Dataset.from_file(file) for file in files])


def _rows(data: Any, identifier: str, first: int) -> Rows:
    """Yield the rows of a data set, numbered from `first`."""
    classes = class_columns(data.features.to_dict())
    for number, row in enumerate(data, first):
        yield Example(unlabelled(dict(row), classes), f"hf://{identifier}: row {number}", padded=True)


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
