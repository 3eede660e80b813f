"""Where files of a prediction are: a path, or the URI of an object store (a str). What is done to them there."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster import store_uri, stores
from cluster.errors import UserError
from jobs import notes
from jobs.checkpoint.store import Store

Place = Path | str


def below(place: Place, name: str) -> Place:
    """Return what lies in a folder. Pure."""
    return place / name if isinstance(place, Path) else stores.joined(place, name)


def beside(place: Place, suffix: str) -> Place:
    """Return the file whose name has an ending besides. Pure."""
    if isinstance(place, Path):
        return place.with_name(place.name + suffix)
    path, mark, query = place.partition("?")
    return path + suffix + mark + query


def shown(place: Place) -> str:
    """Return it for people: a URI without what its store is told. Pure."""
    return str(place) if isinstance(place, Path) else stores.shown(place)


def folder_of(place: Place) -> Place:
    """Return the folder that a file is in. Pure."""
    return place.parent if isinstance(place, Path) else store_uri.split(place)[0]


def read(place: Place) -> bytes:
    """Return a file's content; raise FileNotFoundError where there is none."""
    if isinstance(place, Path):
        return place.read_bytes()
    folder, name = store_uri.split(place)
    return Store(folder).read(name)


def write(place: Place, content: bytes) -> None:
    """Write a file so that it is there whole, or not at all; it is on the disk, or stored, when this returns."""
    if isinstance(place, Path):
        place.parent.mkdir(exist_ok=True)
        with _aside(place) as partial:
            _synced(partial, content)
            partial.rename(place)
        return
    folder, name = store_uri.split(place)
    store = Store(folder)
    stores.repeated(lambda: store.write(name, [content]))


def names(folder: Place) -> list[str]:
    """List the files right in a folder; none where there is no folder."""
    if isinstance(folder, Path):
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    above, name = store_uri.split(folder)
    return Store(above).files(name)


def remove(place: Place) -> None:
    """Delete a file; do nothing where there is none."""
    if isinstance(place, Path):
        place.unlink(missing_ok=True)
        return
    folder, name = store_uri.split(place)
    Store(folder).remove_file(name)


def clear(folder: Place) -> None:
    """Delete a folder with its files; do nothing where there is none."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
        return
    above, name = store_uri.split(folder)
    Store(above).remove(name)


def is_there(place: Place) -> bool:
    """Say whether anything has the name."""
    if isinstance(place, Path):
        return os.path.lexists(place)
    folder, name = store_uri.split(place)
    return Store(folder).exists(name)


def note(place: Place) -> dict[str, Any]:
    """Read a note of JSON; {} where there is none.

    Raises:
        UserError: it is damaged.
    """
    if isinstance(place, Path):
        return notes.read(place)
    try:
        found = json.loads(read(place))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{shown(place)} is damaged: {error}") from error
    return found if isinstance(found, dict) else {}


def keep(place: Place, values: dict[str, Any]) -> None:
    """Write a note of JSON, in place of one that is there."""
    write(place, json.dumps(values, indent=1).encode())


@contextmanager
def stream(uri: str) -> Iterator[Any]:
    """Yield what a file of a store is written to; it is there, whole, at the end, and after an error it is not."""
    folder, name = store_uri.split(uri)
    with Store(folder).stream(name) as sink:
        yield sink


@contextmanager
def _aside(place: Path) -> Iterator[Path]:
    partial = place.with_name(f".{place.name}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def _synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
