"""Which single sources a name stands for, told without reading a byte of them: by names, folders and globs alone.

What `sources.open_source` opens has the same origins, but for what only its store knows: of a URI the files that it
names are not asked for, so that the URI stands for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePath

from jobs.data import audio_folders, hub, listing, remote_listing, tables
from jobs.data.compression import kind
from jobs.data.corpora import BUILT_IN
from jobs.data.file_sources import BESIDE, readable
from jobs.data.listing import Listing
from jobs.data.media import IMAGE_SUFFIXES


def of(where: str | Sequence[str], base: Path) -> list[str]:
    """Return the origins of what `data.train` or `data.eval` names, as far as it is there; relative paths from `base`.

    Raises:
        UserError: a folder cannot be read, or a name stands for too many files.
    """
    if not isinstance(where, str):
        return [origin for part in where for origin in of(part, base)]
    if where in BUILT_IN:
        return [where]
    if listing.existing(where, base) is None and (several := listing.braced(where)):
        return of(several, base)
    if is_of_hub(where):
        return [hub.origin_of(where)]
    return [where] if remote_listing.is_uri(where) else _of_disk(where.removeprefix("file://"), base)


def is_of_hub(where: str) -> bool:
    """Tell whether a name is that of a data set, `hf://owner/name`, and of none of its files."""
    return where.startswith("hf://") and not remote_listing.is_uri(where)


def are_known(where: str | Sequence[str]) -> bool:
    """Tell whether a name's origins are its sources': of a URI, what it names is for the store to say."""
    parts = [where] if isinstance(where, str) else where
    return not any(remote_listing.is_uri(part) for part in parts)


def is_table(origin: str) -> bool:
    """Tell whether `data.columns` may name the columns of a single source."""
    return origin not in BUILT_IN and not is_of_hub(origin) and kind(PurePath(origin)) in tables.SEPARATORS


def labelled_images(folder: Path, found: Listing) -> list[Path]:
    """Return the images of a folder that holds a folder of them for each label; none of one that holds other data."""
    images = [file for file in found.files if file.suffix.lower() in IMAGE_SUFFIXES]
    by_label = [file for file in images if len(file.relative_to(folder).parts) == 2]
    others = sum(readable(file) and kind(file) in BESIDE for file in found.files)
    return by_label if len(images) >= others else []


def readable_files(found: Listing) -> list[Path]:
    """Return the files of a listing that are read: of archives beside other data none, since they may be copies."""
    files = [path for path in found.files if readable(path)]
    return [path for path in files if kind(path) in BESIDE] or files


def _of_disk(where: str, base: Path) -> list[str]:
    path = listing.existing(where, base)
    if path is not None and not path.is_dir():
        return [str(path.resolve())]
    found = listing.of_glob(where, base) if path is None else listing.of_folder(path)
    if path is not None and labelled_images(path, found):
        return [str(path.resolve())]
    heard = audio_folders.are_recordings(found.files, BESIDE)
    return [str(each.resolve()) for each in (audio_folders.sources_in(found) if heard else readable_files(found))]
