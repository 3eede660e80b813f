"""One file as a source: which reader its name asks for, its digest, the parts it can be read in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from jobs.data import listing, opening, readers, remote, tables, tars
from jobs.data.classes import features_in, said_of_names
from jobs.data.compression import COMPRESSED, DAMAGED, compression, kind, other_content, size_of
from jobs.data.examples import BadRow, Cut, Rows, Source, unread
from jobs.data.file_digests import digest_and_cuts, file_digest, open_or_say
from jobs.data.listing import Listing
from jobs.data.remote import Place
from jobs.data.tables import TableForm

READERS = {**readers.READERS, **tables.READERS, ".tar": tars.read}
KINDS = sorted([*READERS, *tables.SEPARATORS])
"""Suffixes of the files that are read."""
BESIDE = frozenset(KINDS) - {".tar"}
"""Those that a folder is taken to be made of: an archive beside them may be what they were packed in."""
CUT_READERS: dict[str, Callable[[Place, Cut], Rows]] = {
    **readers.CUT_READERS,
    ".parquet": tables.read_parquet,
    ".tar": tars.read_cut,
}
_WHOLE = {".parquet"}
"""Kinds that compress inside; another compression around them is not read."""
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def readable(path: Place) -> bool:
    """Tell whether a file is of a kind that is read, compressed or not."""
    return kind(path) in KINDS and not (kind(path) in _WHOLE and compression(path))


def open_file(path: Place, form: TableForm, range_bytes: int, found: Listing | None = None) -> Source:
    """Open a file.

    Args:
        found: is told of the members of an archive that are passed over; None: the notes are.

    Raises:
        UserError: it is of a kind that is not read, no regular file, or an archive without a sample.
    """
    if isinstance(path, Path):
        _refuse_no_file(path)
    if not readable(path):
        raise UserError(
            f"data: {path} has an unknown kind {''.join(path.suffixes[-2:])!r}; known: {', '.join(KINDS)}, "
            f"and all but .parquet compressed as {', '.join(COMPRESSED)}"
        )
    _refuse_pointer(path)
    suffix = kind(path)
    table = suffix in tables.SEPARATORS
    reader = tables.read_separated(tables.SEPARATORS[suffix], form) if table else READERS[suffix]
    names_files = suffix not in readers.TEXT_SUFFIXES
    notes = said_of_names(features_in(path)) if suffix == ".parquet" else ()
    if suffix == ".tar":
        digest, look = _digest(path), _look(path, range_bytes)
        cuts, names_files = tuple(look.cuts) if len(look.cuts) > 1 else (), look.names_files
        notes = _told(path, look, found)
    else:
        digest, cuts = _digest_and_cuts(path, suffix, range_bytes)
    return Source(
        path.name,
        digest,
        partial(whole, path, reader),
        f"{suffix} {_version(suffix)} {compression(path)}" + ("" if isinstance(path, Path) else f" {remote.VERSION}"),
        notes,
        names_files,
        table,
        str(path.resolve()) if isinstance(path, Path) else path.uri,
        size=size_of(path),
        cuts=cuts,
        read_cut=partial(_part, path, CUT_READERS[suffix]) if cuts else None,
    )


def open_files(paths: Sequence[Place], form: TableForm, range_bytes: int, found: Listing | None = None) -> list[Source]:
    """Open files side by side; arguments and errors are those of `open_file`."""

    apart = {} if found is None else {path: Listing() for path in paths}
    opened = opening.each(lambda path: open_file(path, form, range_bytes, apart.get(path)), paths)
    if found is not None:
        for told in apart.values():
            found.add(told)
    return opened


def _version(suffix: str) -> int:
    if suffix == ".tar":
        return tars.VERSION
    return tables.VERSION if suffix in tables.SEPARATORS or suffix in tables.READERS else readers.VERSION


def _refuse_no_file(path: Path) -> None:
    if path.is_symlink() and not path.exists():
        raise UserError(f"data: {path} is a link to nothing")
    listing.refuse_special(path)


def _look(path: Place, range_bytes: int) -> tars.Look:
    """Look at an archive before it is read.

    Raises:
        UserError: it holds no sample.
    """
    look = tars.look(path, range_bytes)
    if look.samples:
        return look
    seen = f" ({', '.join(look.passed_over[: listing.NAMED])} belong to none)" if look.passed_over else ""
    raise UserError(
        f"data: {path} holds no sample{seen}: its files are named SAMPLE.KIND, such as 0001.jpg and 0001.cls"
    )


def _told(path: Place, look: tars.Look, found: Listing | None) -> tuple[str, ...]:
    """Tell a listing, or else in notes, which members of an archive are passed over."""
    told = Listing() if found is None else found
    for name in look.passed_over:
        told.leave_out("members of an archive that are hidden, or not data by their names", f"{path.name}:{name}")
    return told.notes(path.name) if found is None else ()


def _digest(path: Place) -> str:
    return file_digest(path) if isinstance(path, Path) else path.digest


def _digest_and_cuts(path: Place, suffix: str, range_bytes: int) -> tuple[str, tuple[Cut, ...]]:
    """Return a file's digest and the parts that it is read in; no parts where it is small, or read as a whole."""
    if suffix not in readers.CUT_READERS or compression(path):
        digest, cuts = _digest(path), tables.parquet_cuts(path, range_bytes) if suffix in _WHOLE else ()
    elif isinstance(path, Path):
        digest, cuts = digest_and_cuts(path, range_bytes)
    else:
        digest, cuts = path.digest, remote.line_cuts(path, range_bytes)
    return digest, cuts if len(cuts) > 1 else ()


def _refuse_pointer(path: Place) -> None:
    """Raise UserError for what a clone without Git LFS leaves in place of a file; the hub itself gives none."""
    if not isinstance(path, Path) and path.store == remote.HUB:
        return
    with open_or_say(path) if isinstance(path, Path) else path.open(buffer_bytes=len(LFS_POINTER)) as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError(
                f"data: {path} is a pointer of Git LFS, not the file it stands for: git lfs pull fetches it"
            )


def whole(path: Place, reader: Callable[[Any], Rows]) -> Rows:
    """Read a file to its end. One of which nothing can be read is a bad row; one that breaks off ends the job.

    For what is missing of that one cannot be told from what was read, and its rows would be a part of the data that
    nobody chose.

    Raises:
        UserError: it is damaged, or cannot be read, behind its first row.
    """
    begun = False
    try:
        if path.is_file() and kind(path) not in _WHOLE and (what := other_content(path)) is not None:
            bad = BadRow if kind(path) in readers.TEXT_SUFFIXES else unread  # a file of text is one row
            yield bad(str(path), f"the file holds {what}")
            return
        for row in reader(path):
            begun = True
            yield row
    except DAMAGED as error:
        what = f"a {compression(path)} file that is damaged or cut off" if compression(path) else "cannot be read"
        if begun:
            raise UserError(f"data: {path}: {what}: {error}") from error
        yield unread(str(path), f"{what}: {error}")


def _part(path: Place, reader: Callable[[Place, Cut], Rows], cut: Cut) -> Rows:
    """Read a part of a file. One of which nothing can be read is a bad row of its first part.

    Raises:
        UserError: it is damaged, or cannot be read.
    """
    try:
        if kind(path) not in _WHOLE and (what := other_content(path)) is not None:
            if not cut.start:
                yield unread(str(path), f"the file holds {what}")
            return
        yield from reader(path, cut)
    except DAMAGED as error:
        raise UserError(f"data: {path}: cannot be read: {error}") from error
