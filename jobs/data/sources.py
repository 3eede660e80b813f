"""Where raw examples come from: files, globs, image folders, the hub, and corpora that every machine has.

A source gives dictionaries one by one, in a fixed order and as often as it is asked; it has a name and a digest of its
content. Text files are one
example each (`text`); JSONL, JSON, CSV, TSV and Parquet give one example a row; a folder of folders of images gives
`image` and `label`.
"""

from __future__ import annotations

import glob
import hashlib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from jobs.data.corpora import BUILT_IN
from jobs.data.examples import Example, Rows, Source
from jobs.data.readers import READERS, SEPARATORS, read_separated

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp"}
SMALL = 20
"""With fewer texts than this, each is cut to hold a share of it out, instead of whole texts."""


def open_source(where: str | Sequence[str], base: Path, columns: Sequence[str] | None = None) -> Source:
    """Open what `data.train` or `data.eval` names; relative paths start at `base`.

    Args:
        columns: names for the columns of tables that have no header line.

    Raises:
        UserError: nothing there, or of an unknown kind.
    """
    if not isinstance(where, str):
        return _concatenate([open_source(part, base, columns) for part in where])
    if where in BUILT_IN:
        return BUILT_IN[where]()
    if where.startswith("hf://"):
        return _hub(where.removeprefix("hf://"))
    paths = _paths(where, base)
    if not paths:
        hint = "; a data set of the hub is written hf://owner/name" if where.count("/") == 1 else ""
        raise UserError(f"data: nothing matches {where!r} (looked from {base}); built in: {', '.join(BUILT_IN)}{hint}")
    if len(paths) == 1 and paths[0].is_dir():
        return _folder(paths[0], columns)
    return _concatenate([_file(path, columns) for path in paths]) if len(paths) > 1 else _file(paths[0], columns)


def held_out(count: int, fraction: float, seed: int) -> frozenset[int]:
    """Choose which of `count` examples are held out, by the seed alone.

    Raises:
        UserError: nothing would be left to train on.
    """
    if not fraction:
        return frozenset()
    chosen = frozenset(random.Random(seed).sample(range(count), max(1, round(count * fraction))))
    if len(chosen) == count:
        raise UserError(f"data.eval_fraction {fraction} leaves nothing of {count} example(s) to train on")
    return chosen


def _paths(where: str, base: Path) -> list[Path]:
    pattern = where if Path(where).is_absolute() else str(base / where)
    return sorted(Path(path) for path in glob.glob(pattern, recursive=True))


def _concatenate(sources: list[Source]) -> Source:
    digest = hashlib.sha256("".join(source.digest for source in sources).encode()).hexdigest()
    name = sources[0].name if len(sources) == 1 else f"{sources[0].name} and {len(sources) - 1} more"
    return Source(name, digest, lambda: (example for source in sources for example in source.read()))


def _file(path: Path, columns: Sequence[str] | None = None) -> Source:
    suffix = path.suffix.lower()
    reader = read_separated(SEPARATORS[suffix], columns) if suffix in SEPARATORS else READERS.get(suffix)
    if reader is None:
        raise UserError(f"data: {path} has an unknown kind {path.suffix!r}; known: {', '.join(sorted(READERS))}")
    return Source(path.name, _file_digest(path), lambda: reader(path))


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)
    except OSError as error:
        raise UserError(f"data: cannot read {path}: {error.strerror}") from error


def _digest(file: Any) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def _folder(path: Path, columns: Sequence[str] | None = None) -> Source:
    images = sorted(p for p in path.glob("*/*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if images:
        digests = "".join(f"{p.parent.name}{_file_digest(p)}" for p in images)
        digest = hashlib.sha256(digests.encode()).hexdigest()
        return Source(
            path.name,
            digest,
            lambda: (Example({"image": p.read_bytes(), "label": p.parent.name}, str(p)) for p in images),
        )
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in READERS)
    if not files:
        raise UserError(
            f"data: {path} holds neither <label>/<image> files nor files of a known kind ({', '.join(READERS)})"
        )
    whole = _concatenate([_file(p, columns) for p in files])
    return Source(path.name, whole.digest, whole.read)


def _hub(identifier: str) -> Source:
    name, _, split_name = identifier.partition(":")

    def read() -> Rows:
        import datasets

        try:
            for number, row in enumerate(datasets.load_dataset(name, split=split_name or "train")):
                yield Example(dict(row), f"hf://{identifier}: row {number}")
        except Exception as error:  # the hub's client raises many kinds; what matters is which data set and why
            raise UserError(f"data: cannot load hf://{identifier}: {str(error).splitlines()[0]}") from error

    return Source(f"hf://{identifier}", hashlib.sha256(identifier.encode()).hexdigest(), read)
