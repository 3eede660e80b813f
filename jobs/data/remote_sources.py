"""What a URI names as a source: the files there that can be read, each by ranges of its bytes."""

from __future__ import annotations

from dataclasses import replace

from cluster.errors import UserError
from cluster.stores import shown
from jobs.data import audio_folders, file_sources, remote_listing
from jobs.data.compression import kind
from jobs.data.examples import Source
from jobs.data.file_sources import KINDS, open_file, open_files, readable
from jobs.data.joining import joined, said_of_kinds
from jobs.data.media import IMAGE_SUFFIXES
from jobs.data.tables import TableForm


def opened(uri: str, form: TableForm, range_bytes: int) -> Source:
    """Open a file, a folder or a glob of a store.

    Raises:
        UserError: nothing there, or nothing of a kind that is read from stores.
    """
    store, path = remote_listing.split(uri)
    name = f"{shown(store)}/{path}"
    listed, found = remote_listing.listed(uri)
    if not listed and not found.left_out:
        raise UserError(f"data: nothing matches {name!r}")
    if len(listed) == 1 and listed[0].name == path.rpartition("/")[2]:
        return open_file(listed[0], form, range_bytes)
    files = [file for file in listed if readable(file)]
    if any(kind(file) in file_sources.BESIDE for file in files):
        files = [file for file in files if kind(file) in file_sources.BESIDE]
    for file in listed:
        if file not in files:
            found.leave_out("of an unknown kind, or an archive beside other data", file.path)
    if not files:
        media = sum(file.suffix.lower() in IMAGE_SUFFIXES | audio_folders.SUFFIXES for file in listed)
        hint = " Images and recordings are read from tars there (docs/sources.md)." * (media > 0)
        raise UserError(f"data: {name} holds no file of a known kind ({', '.join(KINDS)}).{hint}")
    sources = open_files(files, form, range_bytes, found)
    whole = joined(sources, found.notes(name))
    return replace(whole, notes=(*whole.notes, *said_of_kinds(name, whole)))
