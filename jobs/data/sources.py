"""Where raw examples come from: files, globs, image folders, the hub, and corpora that every machine has.

A source gives dictionaries one by one, in a fixed order and as often as it is asked; it has a name, a digest of its
content, and says how that is read. Text files are one example each (`text`); JSONL, JSON, CSV, TSV and Parquet give one
example a row; a folder of folders of images gives `image` and `label`. Of one file: jobs/data/file_sources.py; tars:
jobs/data/tars.py. Folders of recordings: jobs/data/audio_folders.py. Which files a place names: jobs/data/listing.py;
those of object stores and the hub: jobs/data/remote_sources.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from jobs.data import audio_folders, listing, opening, origins, remote_listing, remote_sources, tables, unchanged
from jobs.data.corpora import BUILT_IN
from jobs.data.examples import Example, Rows, Source
from jobs.data.file_digests import file_digest
from jobs.data.file_sources import BESIDE, KINDS, open_files, readable, whole
from jobs.data.hub import open_hub, origin_of
from jobs.data.joining import joined, once, said_of_kinds, sha256
from jobs.data.listing import Listing
from jobs.data.media import IMAGE_SUFFIXES
from jobs.data.ranges import RANGE_BYTES
from jobs.data.tables import TableForm

_IMAGES_VERSION = 1


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
    with unchanged.noted_for(where, base):
        return _opened(where, base, form, range_bytes)


def _opened(where: str | Sequence[str], base: Path, form: TableForm, range_bytes: int) -> Source:
    if not isinstance(where, str):
        return joined(once([open_source(part, base, form, range_bytes) for part in where]))
    if where in BUILT_IN:
        return replace(BUILT_IN[where](), origin=where)
    several = [] if listing.existing(where, base) else listing.braced(where)
    if several:
        return replace(joined(once([open_source(part, base, form, range_bytes) for part in several])), name=where)
    if origins.is_of_hub(where):
        found = open_hub(where.removeprefix("hf://"), range_bytes)
        return replace(found, origin=found.origin or origin_of(where))
    if remote_listing.is_uri(where):
        return remote_sources.opened(where, form, range_bytes)
    return _of_disk(where.removeprefix("file://"), base, form, range_bytes)


def _of_disk(where: str, base: Path, form: TableForm, range_bytes: int) -> Source:
    path = listing.existing(where, base)
    if path is not None:
        return _folder(path, form, range_bytes) if path.is_dir() else open_files([path], form, range_bytes)[0]
    found = listing.of_glob(where, base)
    if not found.files and not found.left_out:
        hint = "; a data set of the hub is written hf://owner/name" if where.count("/") == 1 else ""
        hint += "; several places are a list: [a, b]" if "," in where or "{" in where else ""
        raise UserError(f"data: nothing matches {where!r} (looked from {base}); built in: {', '.join(BUILT_IN)}{hint}")
    return _of_listing(where, base, found, form, range_bytes)


def _folder(path: Path, form: TableForm, range_bytes: int) -> Source:
    found = listing.of_folder(path)
    if images := origins.labelled_images(path, found):
        return _images(path, images, found)
    if audio_folders.are_recordings(found.files, BESIDE):
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
    digests = zip(images, opening.each(file_digest, images), strict=True)
    digest = sha256("".join(f"{path.parent.name!r} {of_file}\n" for path, of_file in digests))
    reader: Any = lambda _: read()  # noqa: E731
    return Source(
        _name(folder),
        digest,
        lambda: whole(folder, reader),
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
    if audio_folders.are_recordings(found.files, BESIDE):
        return audio_folders.recordings(name, found.root or base, found, form)
    files = origins.readable_files(found)
    read = set(files)
    for path in found.files:
        if readable(path) and path not in read:
            found.leave_out("an archive beside other data, of which it may be a copy: name it", _below(path, base))
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
    opened = open_files(files, form, range_bytes, found)
    return joined(opened, found.notes(name) + said_of_kinds(name, joined(opened)))


def _below(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)
