"""Whether what a job leaves can be written where the spec wants it: asked by writing there, before anything starts."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cluster import home, store_uri, stores
from cluster.errors import UserError, check_all
from jobs.spec import JobSpec

if TYPE_CHECKING:
    from jobs.checkpoint.store import Store

VARIABLE = "TANDEM_STORAGE"
"""Names the storage of specs that name none."""
CONTENT = b"written by Tandem to see whether it can"
ASKED = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs", "hf")
"""Stores that may be asked something when they are opened, or whose client is: none of what can be told at once."""
FAILS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.EFBIG, errno.ENODEV}
"""What only a disk or a file system says. No rights may be a matter of the data."""


class NotWritable(UserError):
    """A place of the spec cannot be written."""


class StorageFailed(UserError):
    """A disk or a file system has failed while the job ran."""

    exit_code = 1


def has_failed(error: BaseException) -> bool:
    """Say whether an error is a disk's, a file system's or a store's own: full, read-only, broken, gone."""
    return (isinstance(error, OSError) and error.errno in FAILS) or stores.is_clients(error)


def told(error: Exception, place: Path) -> Exception:
    """Return an error as it is, or as a sentence where a disk or a file system is the reason.

    Args:
        place: where the job's files are, should the error itself not name one.
    """
    if isinstance(error, OSError) and error.errno in FAILS:
        where = error.filename or f"the job's files are in {place}"
        return StorageFailed(
            f"a file could not be written or read: {os.strerror(error.errno)} ({where}); mend that, and submit the "
            "same spec again to go on"
        )
    if stores.is_clients(error):
        return StorageFailed(
            f"a store failed: {error}; see that it answers, and that this machine may read and write there (its "
            "credentials and address come from the environment), and submit the same spec again to go on"
        )
    return error


def located(spec: JobSpec, base: Path) -> str:
    """Return what the spec's `storage` means, or TANDEM_STORAGE where it has none: an absolute path, or a URI.

    Args:
        base: where relative paths in the spec start.

    Raises:
        UserError: a URI names no folder, or may hold a secret, and would be kept where others read it.
    """
    if spec.storage:
        return _checked(spec.storage, "storage", str(base / Path(spec.storage).expanduser()))
    named = os.environ.get(VARIABLE, "")
    if "://" in named:
        return _checked(named, VARIABLE, named)
    return str(Path(named).expanduser().absolute() if named else home.home().absolute() / "storage")


def _checked(place: str, key: str, path: str) -> str:
    return store_uri.checked(place, key) if store_uri.is_store(place) else place if "://" in place else path


def uri(spec: JobSpec, base: Path) -> str | None:
    """Return the object store that the job keeps everything in; None where that is a folder."""
    found = located(spec, base)
    return found if "://" in found else None


def root(spec: JobSpec, base: Path) -> Path:
    """Return the folder that the job works in on this node: the storage, or what it has of an object store."""
    found = located(spec, base)
    if "://" not in found:
        return Path(found)
    path = stores.shown(found).rstrip("/")
    name = re.sub(r"[^A-Za-z0-9]+", "-", path.partition("://")[2])[-40:].strip("-")
    return home.home().absolute() / "stores" / f"{name}-{hashlib.sha256(found.encode()).hexdigest()[:8]}"


def checkpoints_root(spec: JobSpec, base: Path) -> str | None:
    """Return where the spec wants the checkpoints of all its runs, a path or a URI; None: in the run's folder."""
    elsewhere = spec.checkpoint.directory
    if elsewhere is None or "://" in elsewhere:
        return elsewhere
    return str(base / Path(elsewhere).expanduser())


def check(spec: JobSpec, base: Path) -> None:
    """Write, read, rename and delete a small file in each place that the job will write.

    Raises:
        NotWritable: one of them refuses.
    """
    for key, place in places(spec, base).items():
        if "://" in place:
            try_uri(key, place)
        else:
            try_folder(key, Path(place))


def check_named(spec: JobSpec, base: Path) -> None:
    """Refuse those of the places of which it can be told without writing, or asking a store, that they cannot do.

    Raises:
        NotWritable: nothing opens such a URI, or a file is where a folder should be.
    """
    check_all(*(partial(_check_name, key, place) for key, place in places(spec, base).items()))


def _check_name(key: str, place: str) -> None:
    if "://" not in place:
        if (file := _in_the_way(Path(place))) is not None:
            raise NotWritable(_sentence(key, place, f"{file} is a file"))
    elif place.partition("://")[0].lower() not in ASKED:
        opened(key, place)


def places(spec: JobSpec, base: Path) -> dict[str, str]:
    """Return where the job will write, by the key that says so: paths and URIs."""
    trained = {"checkpoint.directory": checkpoints_root(spec, base), "model.export": spec.model.export}
    places = {"storage": located(spec, base), **(trained if spec.training is not None else {})}
    return {key: place for key, place in places.items() if place is not None}


def try_folder(key: str, folder: Path) -> None:
    """Make a folder on a disk, and a file in it.

    Raises:
        NotWritable: something of that is refused; `key` is what the spec calls it.
    """
    probe = folder / f".tandem-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(CONTENT)
            moved = probe.rename(probe.with_suffix(".moved"))
            read = moved.read_bytes()
            moved.unlink()
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise NotWritable(_sentence(key, str(folder), _reason(folder, error))) from error
    if read != CONTENT:
        raise NotWritable(_sentence(key, str(folder), "what was written is not what is read"))


def try_uri(key: str, uri: str) -> None:
    """Write, read and delete a small file behind a URI.

    Raises:
        NotWritable: something of that is refused, or no file system knows the URI.
    """
    name, store = f".tandem-{secrets.token_hex(4)}", opened(key, uri)
    with _told_of(key, uri):
        store.write(f"{name}/probe", [CONTENT])
        read = store.read(f"{name}/probe")
        store.remove(name)
    if read != CONTENT:
        raise NotWritable(_sentence(key, uri, "what was written is not what is read"))


def opened(key: str, uri: str) -> Store:
    """Open the store behind a URI. Nothing is written; that of an object store may be asked where it is.

    Raises:
        NotWritable: it cannot be opened, or no file system knows the URI.
    """
    from jobs.checkpoint.store import Store

    with _told_of(key, uri):
        return Store(uri)


@contextmanager
def _told_of(key: str, uri: str) -> Iterator[None]:
    """Say what a store refuses by the key that names it."""
    from pyarrow import ArrowException

    try:
        yield
    except (OSError, ArrowException, ValueError) as error:
        number = error.errno if isinstance(error, OSError) else None
        raise NotWritable(_sentence(key, uri, os.strerror(number) if number else str(error))) from error


def _reason(folder: Path, error: OSError) -> str:
    file = _in_the_way(folder)
    return error.strerror or str(error) if file is None else f"{file} is a file"


def _in_the_way(folder: Path) -> Path | None:
    """Return what of a folder's path is no folder; None where that is none."""
    # Not Path.exists: it raises where a folder above may not be searched.
    return next((path for path in (folder, *folder.parents) if os.path.exists(path) and not os.path.isdir(path)), None)


def _sentence(key: str, place: str, reason: str) -> str:
    return f"{key}: {place} cannot be written: {reason}; mend that, or set {key} to a place that this job may write to"
