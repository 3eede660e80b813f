"""Whether a place is the same one for all nodes: small files, each written on one node, read on the others, removed.

    made = put(place, "a1b2", b"…")           # on one node
    get(place, "a1b2")                        # on another: the same bytes, or an OSError
    remove(place, "a1b2")                     # where it was written
    remove_folders(made)                      # there too, once all nodes have removed their files

A place is a folder or a URI (cluster/stores.py). Nothing here needs Ray.
"""

from __future__ import annotations

import os
import time
import urllib.parse
from collections.abc import Iterable, Mapping
from pathlib import Path

from cluster import stores

PREFIX = ".tandem-doctor-"
"""How the names of its files begin, should one stay behind."""
READ_WITHIN_S = 5.0
"""So long a file may take to be seen on another node: what NFS remembers of a folder may be 3 s old."""


def put(place: str, name: str, content: bytes) -> list[str]:
    """Write a file into a place, down to the disk; return the folders that were made for it, the innermost first.

    Raises:
        OSError: the place, or pyarrow on behalf of its store, refuses.
    """
    folder = _folder(place)
    if folder is None:
        filesystem, base = stores.opened(place)
        with filesystem.open_output_stream(f"{base.rstrip('/')}/{PREFIX}{name}") as stream:
            stream.write(content)
        return []
    made = _missing_folders(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with (folder / f"{PREFIX}{name}").open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        remove(place, name)
        remove_folders(made)
        raise
    return made


def get(place: str, name: str, within_s: float = READ_WITHIN_S) -> bytes:
    """Read a file of another node's, which may take a moment to be seen here.

    Raises:
        OSError: it is not there, or cannot be read.
    """
    deadline, folder = time.monotonic() + within_s, _folder(place)
    while True:
        try:
            return _read(place, name)
        except FileNotFoundError:
            # Nobody has looked into a folder that is not there: waiting would not show it.
            if time.monotonic() > deadline or (folder is not None and not folder.is_dir()):
                raise
        time.sleep(0.2)


def remove(place: str, name: str) -> None:
    """Remove a file that `put` wrote.

    Raises:
        OSError: it stays.
    """
    folder = _folder(place)
    if folder is None:
        filesystem, base = stores.opened(place)
        filesystem.delete_file(f"{base.rstrip('/')}/{PREFIX}{name}")
        return
    (folder / f"{PREFIX}{name}").unlink(missing_ok=True)


def remove_folders(made: Iterable[str]) -> None:
    """Remove the folders that `put` has made, as far as they are empty."""
    for folder in made:
        try:
            os.rmdir(folder)
        except OSError:  # another has written there meanwhile, or removed it
            return


def unseen(written: Mapping[str, bytes], found: Mapping[str, bytes | str]) -> dict[str, str]:
    """Return, by writer, why one node has not read what the others wrote. Pure.

    Args:
        written: by writer, what it wrote.
        found: by writer, the bytes that were read, or an error as text.
    """
    wrong = {}
    for writer, expected in written.items():
        got = found.get(writer, "not asked")
        if got != expected:
            wrong[writer] = got if isinstance(got, str) else "other bytes than were written"
    return wrong


def _read(place: str, name: str) -> bytes:
    folder = _folder(place)
    if folder is not None:
        return (folder / f"{PREFIX}{name}").read_bytes()
    filesystem, base = stores.opened(place)
    with filesystem.open_input_stream(f"{base.rstrip('/')}/{PREFIX}{name}") as stream:
        return bytes(stream.read())


def _folder(place: str) -> Path | None:
    """Return the folder that a place is; None: it is a store's."""
    if place.startswith("file://"):
        return Path(urllib.parse.unquote(urllib.parse.urlsplit(place).path))
    return None if "://" in place else Path(place)


def _missing_folders(folder: Path) -> list[str]:
    """List what of a folder's path is not there, the innermost first."""
    return [str(path) for path in (folder, *folder.parents) if not path.exists()]
