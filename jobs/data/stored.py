"""Prepared data in an object store: stored once by who prepared it, fetched once by each node that reads it.

    <storage>/data/<digest>/train-00000.arrow …, task/…, meta.json      as on a disk (jobs/data/prepare.py)
                            files.json        size and SHA-256 of each of them, written last: without it there is none

What is fetched is checked by its digests, and gets its name on the node's disk when it is whole. Of several processes
of a node one fetches, and the others wait.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from cluster import stores
from cluster.errors import UserError
from jobs.checkpoint.store import CHUNK_BYTES, Store, Written
from jobs.data.unfinished import META

FILES = "files.json"
FOLDER = "data"
Told = Callable[[int, int], object]
"""Is told how many bytes are done, and of how many."""


def _unheard(done: int, total: int) -> None:
    pass


def is_stored(store: Store, name: str) -> bool:
    """Say whether a data set is stored, whole."""
    return store.exists(f"{FOLDER}/{name}/{FILES}")


def push(store: Store, directory: Path, told: Told = _unheard) -> None:
    """Store a folder of prepared data, unless it is stored; the folders of what was made of it are left out.

    Raises:
        OSError: the store does not take it. What was stored of it stays, and is stored anew by the next one.
    """
    if is_stored(store, directory.name):
        return
    files = {name: directory / name for name in _names(directory)}
    total, done = sum(path.stat().st_size for path in files.values()), 0
    written: dict[str, Written] = {}
    for name, path in files.items():
        told(done, total)
        target = f"{FOLDER}/{directory.name}/{name}"
        written[name] = stores.repeated(lambda target=target, path=path: store.write(target, _chunks(path)))  # type: ignore[misc]
        done += written[name].size
    told(done, total)
    index = json.dumps({name: [each.size, each.sha256] for name, each in written.items()})
    stores.repeated(lambda: store.write(f"{FOLDER}/{directory.name}/{FILES}", [index.encode()]))


def fetch(store: Store, directory: Path, told: Told = _unheard) -> bool:
    """Have a folder of prepared data on this node's disk; return whether it is there now.

    Raises:
        UserError: what is stored is damaged, or the disk has no room for it.
        OSError: the store does not answer.
    """
    if (directory / META).is_file():
        return True
    if not is_stored(store, directory.name):
        return False
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _alone(directory.with_name(f".{directory.name}.lock")):
        if not (directory / META).is_file():
            _fetch(store, directory, told)
    return True


def _fetch(store: Store, directory: Path, told: Told) -> None:
    aside = directory.with_name(f".{directory.name}.fetched")
    shutil.rmtree(aside, ignore_errors=True)  # a process that was killed left it
    where = store.locate(f"{FOLDER}/{directory.name}")
    try:
        index = _index(store.read(f"{FOLDER}/{directory.name}/{FILES}"), where)
        total, done = sum(each.size for each in index.values()), 0
        _check_room(directory.parent, total, where)
        for name, wanted in index.items():
            told(done, total)
            path = aside / name
            path.parent.mkdir(parents=True, exist_ok=True)
            source = f"{FOLDER}/{directory.name}/{name}"
            found = stores.repeated(lambda source=source, path=path: _download(store, source, path))  # type: ignore[misc]
            if found != wanted:
                raise UserError(
                    f"data: {where}/{name} is damaged ({found.size} bytes, SHA-256 {found.sha256[:12]}, and not "
                    f"{wanted.size}, {wanted.sha256[:12]}): remove {where}, and it is prepared again"
                )
            done += found.size
        told(done, total)
        try:
            os.replace(aside, directory)
        except OSError:  # a preparation on this node was faster: its data is the same
            if not (directory / META).is_file():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _index(content: bytes, where: str) -> Mapping[str, Written]:
    try:
        found = {str(name): Written(int(size), str(digest)) for name, (size, digest) in json.loads(content).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"data: {where}/{FILES} is damaged: remove {where}, and it is prepared again") from error
    if META not in found or any(name.startswith("/") or ".." in name.split("/") for name in found):
        raise UserError(f"data: {where}/{FILES} names no prepared data: remove {where}, and it is prepared again")
    return found


def _check_room(folder: Path, needed: int, where: str) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"data: {needed / 1e9:.3g} GB of prepared rows from {where} do not fit in {folder}, which has "
            f"{free / 1e9:.3g} GB free: make room, or set TANDEM_HOME to a folder on a larger disk"
        )


def _download(store: Store, source: str, target: Path) -> Written:
    digest, size = hashlib.sha256(), 0
    with store.input(source) as stream, target.open("wb") as file:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
            file.write(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return Written(size, digest.hexdigest())


def _names(directory: Path) -> list[str]:
    """List the files of the data itself, meta.json last."""
    found = [path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()]
    kept = [name for name in found if "/" not in name or name.startswith("task/")]
    return sorted(kept, key=lambda name: (name == META, name))


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Be the only process of this machine that fetches a data set; the lock goes with the process."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
