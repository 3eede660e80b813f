"""Where raw examples come from: files, globs, image folders, the hub, and corpora that every machine has.

A source gives dictionaries one by one, in a fixed order and as often as it is asked; it has a name, a digest of its
content, and says how that is read. Text files are one example each (`text`); JSONL, JSON, CSV, TSV and Parquet give one
example a row; a folder of folders of images gives `image` and `label`.
Folders of recordings: jobs/data/audio_folders.py. Which files a place names: jobs/data/listing.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from jobs.data import audio_folders, listing, readers, tables
from jobs.data.classes import features_in, said_of_names
from jobs.data.compression import COMPRESSED, DAMAGED, compression, kind, other_content
from jobs.data.corpora import BUILT_IN
from jobs.data.examples import BadRow, Cut, Example, Rows, Source, unread
from jobs.data.file_digests import digest_and_cuts, file_digest, open_or_say
from jobs.data.hub import open_hub
from jobs.data.joining import joined, once, said_of_kinds, sha256
from jobs.data.listing import Listing
from jobs.data.ranges import RANGE_BYTES
from jobs.data.tables import TableForm

IMAGE_SUFFIXES = {
    ".png",
    ".jpg",
    ".jpeg",
    ".jfif",
    ".bmp",
    ".gif",
    ".webp",
    ".tif",
    ".tiff",
    ".pbm",
    ".pgm",
    ".ppm",
    ".pnm",
}
READERS = {**readers.READERS, **tables.READERS}
KINDS = sorted([*READERS, *tables.SEPARATORS])
"""Suffixes of the files that are read."""
CUT_READERS: dict[str, Callable[[Path, Cut], Rows]] = {**readers.CUT_READERS, ".parquet": tables.read_parquet}
_WHOLE = {".parquet"}
"""Kinds that compress inside; another compression around them is not read."""
_IMAGES_VERSION = 1
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def open_source(
    where: str | Sequence[str], base: Path, form: TableForm = tables.PLAIN, range_bytes: int = RANGE_BYTES
) -> Source:
    """Open what `data.train` or `data.eval` names; relative paths start at `base`.

    Args:
        form: what CSV and TSV files do not say of themselves.
        range_bytes: larger files are read in parts of about so many bytes, where they can be.

    Raises:
        UserError: nothing there, or of an unknown kind.
    """
    if not where:
        raise UserError("data: an empty name or list names no data")
    if not isinstance(where, str):
        return joined(once([open_source(part, base, form, range_bytes) for part in where]))
    if where in BUILT_IN:
        return replace(BUILT_IN[where](), origin=where)
    if where.startswith("hf://"):
        return replace(open_hub(where.removeprefix("hf://")), origin=where)
    if "://" in where:
        raise UserError(f"data: {where!r} is a URL, and only hf:// is fetched: download it, and name the file")
    path = listing.existing(where, base)
    if path is not None:
        return _folder(path, form, range_bytes) if path.is_dir() else _file(path, form, range_bytes)
    found = listing.of_glob(where, base)
    if not found.files and not found.left_out:
        hint = "; a data set of the hub is written hf://owner/name" if where.count("/") == 1 else ""
        hint += "; several places are a list: [a, b]" if "," in where or "{" in where else ""
        raise UserError(f"data: nothing matches {where!r} (looked from {base}); built in: {', '.join(BUILT_IN)}{hint}")
    return _of_listing(where, base, found, form, range_bytes)


def readable(path: Path) -> bool:
    """Tell whether a file is of a kind that is read, compressed or not."""
    return kind(path) in KINDS and not (kind(path) in _WHOLE and compression(path))


def _file(path: Path, form: TableForm, range_bytes: int) -> Source:
    if path.is_symlink() and not path.exists():
        raise UserError(f"data: {path} is a link to nothing")
    listing.refuse_special(path)
    if not readable(path):
        raise UserError(
            f"data: {path} has an unknown kind {''.join(path.suffixes[-2:])!r}; known: {', '.join(KINDS)}, "
            f"and all but .parquet compressed as {', '.join(COMPRESSED)}"
        )
    _refuse_pointer(path)
    suffix = kind(path)
    table = suffix in tables.SEPARATORS
    reader = tables.read_separated(tables.SEPARATORS[suffix], form) if table else READERS[suffix]
    version = tables.VERSION if table or suffix in tables.READERS else readers.VERSION
    digest, cuts = _digest_and_cuts(path, suffix, range_bytes)
    return Source(
        path.name,
        digest,
        partial(_whole, path, reader),
        f"{suffix} {version} {compression(path)}",
        said_of_names(features_in(path)) if suffix == ".parquet" else (),
        suffix not in readers.TEXT_SUFFIXES,
        table,
        str(path.resolve()),
        size=path.stat().st_size,
        cuts=cuts,
        read_cut=partial(_part, path, CUT_READERS[suffix]) if cuts else None,
    )


def _digest_and_cuts(path: Path, suffix: str, range_bytes: int) -> tuple[str, tuple[Cut, ...]]:
    """Return a file's digest and the parts that it is read in; no parts where it is small, or read as a whole."""
    if suffix in readers.CUT_READERS and not compression(path):
        digest, cuts = digest_and_cuts(path, range_bytes)
    else:
        digest, cuts = file_digest(path), tables.parquet_cuts(path, range_bytes) if suffix in _WHOLE else ()
    return digest, cuts if len(cuts) > 1 else ()


def _refuse_pointer(path: Path) -> None:
    """Raise UserError for what a clone without Git LFS leaves in place of a file."""
    with open_or_say(path) as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError(
                f"data: {path} is a pointer of Git LFS, not the file it stands for: git lfs pull fetches it"
            )


def _whole(path: Path, reader: Callable[[Path], Rows]) -> Rows:
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


def _part(path: Path, reader: Callable[[Path, Cut], Rows], cut: Cut) -> Rows:
    """Read a part of a file. One of which nothing can be read is a bad row of its first part.

    Raises:
        UserError: it is damaged, or cannot be read.
    """
    try:
        if kind(path) not in _WHOLE and (what := other_content(path)) is not None:
            if not cut.before:
                yield unread(str(path), f"the file holds {what}")
            return
        yield from reader(path, cut)
    except DAMAGED as error:
        raise UserError(f"data: {path}: cannot be read: {error}") from error


def _folder(path: Path, form: TableForm, range_bytes: int) -> Source:
    found = listing.of_folder(path)
    images = [file for file in found.files if file.suffix.lower() in IMAGE_SUFFIXES]
    by_label = [file for file in images if len(file.relative_to(path).parts) == 2]
    if by_label and len(images) >= sum(map(readable, found.files)):
        return _images(path, by_label, found)
    if audio_folders.are_recordings(found.files, READERS | tables.SEPARATORS):
        return audio_folders.recordings(_name(path), path, found, form)
    whole = _of_listing(_name(path), path, found, form, range_bytes)
    return replace(whole, name=_name(path))


def _images(folder: Path, images: list[Path], found: Listing) -> Source:
    for path in found.files:
        shown, depth = str(path.relative_to(folder)), len(path.relative_to(folder).parts)
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            found.leave_out(f"of no kind of image that is read ({', '.join(sorted(IMAGE_SUFFIXES))})", shown)
        elif depth != 2:
            found.leave_out(f"an image {'without' if depth == 1 else 'deeper than'} the folder of its label", shown)

    def read() -> Rows:
        for path in images:
            yield Example({"image": path.read_bytes(), "label": path.parent.name}, str(path))

    labelled = {path.parent.name for path in images}
    for folder_ in sorted(path for path in folder.iterdir() if path.is_dir() and not _skipped(path)):
        if folder_.name not in labelled:
            found.leave_out("a folder without an image, which makes no label", folder_.name)
    digest = sha256("".join(f"{p.parent.name!r} {file_digest(p)}\n" for p in images))
    reader: Any = lambda _: read()  # noqa: E731
    return Source(
        _name(folder),
        digest,
        lambda: _whole(folder, reader),
        f"images {_IMAGES_VERSION}",
        found.notes(_name(folder)),
        origin=str(folder.resolve()),
    )


def _skipped(folder: Path) -> bool:
    return listing.hidden(folder) or folder.is_symlink()


def _name(folder: Path) -> str:
    return folder.resolve().name or str(folder)


def _of_listing(name: str, base: Path, found: Listing, form: TableForm, range_bytes: int) -> Source:
    """Open the files of a known kind; the others are named, from `base`.

    Raises:
        UserError: there is none.
    """
    if audio_folders.are_recordings(found.files, READERS | tables.SEPARATORS):
        return audio_folders.recordings(name, found.root or base, found, form)
    files = [path for path in found.files if readable(path)]
    for path in found.files:
        if not readable(path):
            found.leave_out("of an unknown kind", _below(path, base))
    if not files:
        images = sum(path.suffix.lower() in IMAGE_SUFFIXES for path in found.files)
        hint = f" Images are read from a folder that holds a folder for each label ({images} lie otherwise)." * (
            images > 0
        )
        raise UserError(
            f"data: {name} ({base}) holds neither <label>/<image> files nor files of a known kind ({', '.join(KINDS)})."
            f"{hint} {'; '.join(found.notes(name))}".rstrip()
        )
    opened = [_file(path, form, range_bytes) for path in files]
    return joined(opened, found.notes(name) + said_of_kinds(name, joined(opened)))


def _below(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)
