"""The folder of a model whose weights lie in a store → one that has them all, on this machine.

    $TANDEM_HOME/cache/weights/<SHA-256>.safetensors     what was fetched, once a machine, whatever it belongs to
                       models/<digest>/                  a model's folder, copied, with links to its weights

All of it may be removed at any time when nothing is loaded from it: it is fetched again. A process that fetches holds a
lock; others that want the same wait for it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cluster import stored_weights
from cluster.errors import UserError
from cluster.home import home
from cluster.stored_weights import Stored

SAID_AFTER_S = 2.0
SAID_EVERY_S = 10.0


def local(directory: Path | str) -> Path:
    """Return the folder of a model with its weights in it: the same one, unless these lie in a store.

    What is not on this machine is fetched, and its digest checked.

    Raises:
        UserError: what is stored is missing or another one, or the disk has no room for it.
    """
    stored = stored_weights.read(directory)
    folder = Path(directory)
    if stored is None or not stored.lacking(folder):
        return folder
    whole = home() / "cache" / "models" / _key(folder, stored)
    if whole.is_dir() and not stored.lacking(whole):
        return whole
    blobs = home() / "cache" / "weights"
    blobs.mkdir(parents=True, exist_ok=True)
    for name in sorted(stored.files):
        _fetch(stored, name, blobs)
    _assemble(folder, stored, blobs, whole)
    return whole


def is_here(directory: Path | str) -> bool:
    """Say whether `local` has nothing to fetch."""
    stored, folder = stored_weights.read(directory), Path(directory)
    if stored is None or not stored.lacking(folder):
        return True
    blobs = home() / "cache" / "weights"
    return all(_is_here(blobs, stored, name) for name in stored.files)


def _key(folder: Path, stored: Stored) -> str:
    """Return the name of a folder's copy: another one for each state of its files."""
    digest = hashlib.sha256(f"{folder.resolve()}\n".encode())
    for path in _small(folder, stored):
        about = path.stat()
        digest.update(f"{path.relative_to(folder)} {about.st_size} {about.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:32]


def _small(folder: Path, stored: Stored) -> list[Path]:
    """List the files of a folder but those that lie in the store."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in stored.files)


def _blob(blobs: Path, stored: Stored, name: str) -> Path:
    return blobs / f"{stored.files[name].sha256}.safetensors"


def _is_here(blobs: Path, stored: Stored, name: str) -> bool:
    path = _blob(blobs, stored, name)
    return path.is_file() and path.stat().st_size == stored.files[name].bytes


def _fetch(stored: Stored, name: str, blobs: Path) -> None:
    """Have a file of weights in the cache, whole and with its digest.

    Raises:
        UserError: it is missing or another one, or does not fit.
    """
    target = _blob(blobs, stored, name)
    if _is_here(blobs, stored, name):
        return
    with alone(target.with_suffix(".lock"), stored.uri(name)):
        if _is_here(blobs, stored, name):
            return
        for left in blobs.glob(f".{target.stem}.*.partial"):  # of processes that were killed
            left.unlink(missing_ok=True)
        _check_room(stored, blobs)
        partial = blobs / f".{target.stem}.{secrets.token_hex(4)}.partial"
        try:
            found = stored_weights.asked(stored, name, lambda: _pour(stored, name, partial))
            if found != stored.files[name].sha256:
                wrong = f"{partial.stat().st_size} bytes came, SHA-256 {found[:12]}"
                raise UserError(stored_weights.changed(stored, name, wrong))
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)


def _check_room(stored: Stored, blobs: Path) -> None:
    """Refuse to begin what the disk has no room for: all files that are still to come.

    Raises:
        UserError: it has not.
    """
    needed = sum(file.bytes for name, file in stored.files.items() if not _is_here(blobs, stored, name))
    free = shutil.disk_usage(blobs).free
    if needed > free:
        raise UserError(
            f"{needed / 1e9:.3g} GB of weights from {stored.uri()} do not fit in {blobs}, which has {free / 1e9:.3g} "
            f"GB free: remove {blobs.parent}, whose contents are fetched again when they are wanted, or set "
            "TANDEM_HOME to a folder on a larger disk"
        )


def _pour(stored: Stored, name: str, target: Path) -> str:
    """Write a file of the store to the disk, and return its SHA-256 (hex). It says how far it is if it takes long."""
    digest, done = hashlib.sha256(), 0
    said, total = time.monotonic() - SAID_EVERY_S + SAID_AFTER_S, stored.files[name].bytes
    with target.open("wb") as file:
        for chunk in stored_weights.chunks(stored, name):
            digest.update(chunk)
            file.write(chunk)
            done += len(chunk)
            if time.monotonic() - said > SAID_EVERY_S:
                said = time.monotonic()
                _say(f"fetching {stored.uri(name)}: {done / 1e9:.3g} of {total / 1e9:.3g} GB")
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _assemble(folder: Path, stored: Stored, blobs: Path, whole: Path) -> None:
    """Copy a model's folder beside its weights; of two processes that do, one's copy stays."""
    whole.parent.mkdir(parents=True, exist_ok=True)
    partial = whole.with_name(f".{whole.name}.{secrets.token_hex(4)}.partial")
    try:
        for path in _small(folder, stored):
            target = partial / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        for name in stored.files:
            _link(_blob(blobs, stored, name), partial / name)
        if whole.is_dir() and stored.lacking(whole):
            shutil.rmtree(whole, ignore_errors=True)
        with suppress(OSError):  # another process has been faster
            partial.rename(whole)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if lacking := stored.lacking(whole):
        raise UserError(f"{whole / lacking[0]} was removed while it was put together: try again")


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        target.symlink_to(source)


@contextmanager
def alone(path: Path, what: str) -> Iterator[None]:
    """Be the only process of this machine that fetches a file; the lock goes with the process."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            _say(f"waiting for the process that fetches {what}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _say(sentence: str) -> None:
    """Print to the log of this process; what commands answer is on the other stream."""
    print(sentence, file=sys.stderr, flush=True)
