"""Whether what a job leaves can be written where the spec wants it: asked by writing there, before anything starts."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path

from cluster import home
from cluster.errors import UserError
from jobs.spec import JobSpec

CONTENT = b"written by Tandem to see whether it can"
FAILS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.EFBIG, errno.ENODEV}
"""What only a disk or a file system says. No rights may be a matter of the data."""


class NotWritable(UserError):
    """A place of the spec cannot be written."""


class StorageFailed(UserError):
    """A disk or a file system has failed while the job ran."""

    exit_code = 1


def has_failed(error: BaseException) -> bool:
    """Say whether an error is a disk's or a file system's own: full, read-only, broken, gone."""
    return isinstance(error, OSError) and error.errno in FAILS


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
    return error


def root(spec: JobSpec, base: Path) -> Path:
    """Return the folder that the spec's `storage` means; relative paths start at `base`."""
    return base / Path(spec.storage).expanduser() if spec.storage else (home.home() / "storage").absolute()


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
    try_folder("storage", root(spec, base))
    places = {"checkpoint.directory": checkpoints_root(spec, base), "model.export": spec.model.export}
    for key, place in places.items() if spec.training is not None else ():
        if place is not None and "://" in place:
            try_uri(key, place)
        elif place is not None:
            try_folder(key, Path(place))


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
    from pyarrow import ArrowException

    from jobs.checkpoint.store import Store

    name = f".tandem-{secrets.token_hex(4)}"
    try:
        store = Store(uri)
        store.write(f"{name}/probe", [CONTENT])
        read = store.read(f"{name}/probe")
        store.remove(name)
    except (OSError, ArrowException, ValueError) as error:
        number = error.errno if isinstance(error, OSError) else None
        raise NotWritable(_sentence(key, uri, os.strerror(number) if number else str(error))) from error
    if read != CONTENT:
        raise NotWritable(_sentence(key, uri, "what was written is not what is read"))


def _reason(folder: Path, error: OSError) -> str:
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            return f"{path} is a file"
    return error.strerror or str(error)


def _sentence(key: str, place: str, reason: str) -> str:
    return f"{key}: {place} cannot be written: {reason}; mend that, or set {key} to a place that this job may write to"
