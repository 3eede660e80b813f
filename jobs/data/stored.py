"""Prepared data in an object store: stored once by who prepared it, fetched once by each node that reads it.

    <storage>/data/<digest>/train-00000.arrow …, task/…, meta.json      as on a disk (jobs/data/prepare.py)
                            train-00001.0a1b2c3d4e5f.arrow …     those that the nodes of a cluster have stored as they
                                              made them (jobs/data/stored_work.py), named by their content
                            reference-<digest>/  what a model has made of the rows, with a files.json of its own
                            files.json        size and SHA-256 of each of them, and its object where that has another
                                              name; written last: without it there is none

What is fetched is checked by its digests, and gets its name on the node's disk when it is whole. Of several processes
of a node one fetches, and the others wait; several files are under way at a time.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import stores
from cluster.errors import UserError
from jobs.checkpoint.store import CHUNK_BYTES, Store, Written
from jobs.data.file_digests import file_digest
from jobs.data.unfinished import META

FILES = "files.json"
ROWS = ".arrow"
FOLDER = "data"
AT_ONCE = 4
"""So many files are under way at a time."""
Told = Callable[[int, int], object]
"""Is told how many bytes are done, and of how many."""


def _unheard(done: int, total: int) -> None:
    pass


def is_stored(store: Store, name: str) -> bool:
    """Say whether a data set is stored, whole."""
    return store.exists(f"{FOLDER}/{name}/{FILES}")


@dataclass(frozen=True)
class Kept:
    """A file of a data set in the store."""

    size: int
    sha256: str
    place: str
    """The object's name, below that of the data set."""


def object_of(file: str, digest: str) -> str:
    """Return the name under which a node stores a file of rows as soon as it has made it. Pure."""
    stem, dot, suffix = file.rpartition(".")
    return f"{stem}.{digest[:12]}{dot}{suffix}"


def file_of(name: str) -> str:
    """Return the file of rows that `object_of` has named so; any other name as it is. Pure."""
    parts = name.split(".")
    return f"{'.'.join(parts[:-2])}.{parts[-1]}" if len(parts) > 2 and len(parts[-2]) == 12 else name


def away(name: str) -> str:
    """Return the folder, beside a data set's, in which a node works at it for a driver elsewhere. Pure."""
    return f".{name}.away"


def push(store: Store, directory: Path, told: Told = _unheard) -> None:
    """Store a folder of prepared data, unless it is stored; the folders of what was made of it are left out.

    Raises:
        OSError: the store does not take it. What was stored of it stays, and is stored anew by the next one.
    """
    name = directory.name
    if is_stored(store, name):
        store.remove(f"{FOLDER}/{name}.partial")  # another preparation of the same data was faster
        return
    files = {each: directory / each for each in _names(directory)}
    total, there = sum(path.stat().st_size for path in files.values()), set(store.tree(f"{FOLDER}/{name}"))
    counted = _Counted(told, total)

    def one(each: str) -> Kept:
        path = files[each]
        if each.endswith(ROWS) and (place := object_of(each, digest := file_digest(path))) in there:
            found = Kept(path.stat().st_size, digest, place)  # its name is its content's, and it was written whole
        else:
            made = stores.repeated(lambda: store.write(f"{FOLDER}/{name}/{each}", chunks(path)))
            found = Kept(made.size, made.sha256, each)
        counted.add(found.size)
        return found

    *first, last = files  # meta.json
    kept = dict(zip(first, _side_by_side(one, first), strict=True)) | {last: one(last)}
    index = {each: [k.size, k.sha256, *([k.place] if k.place != each else [])] for each, k in kept.items()}
    stores.repeated(lambda: store.write(f"{FOLDER}/{name}/{FILES}", [json.dumps(index).encode()]))
    store.remove(f"{FOLDER}/{name}.partial")


def forget(store: Store, name: str) -> None:
    """Remove what a preparation that has failed by its data has stored of it."""
    store.remove(f"{FOLDER}/{name}.partial")
    if not is_stored(store, name):
        store.remove(f"{FOLDER}/{name}")


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
    shutil.rmtree(directory.with_name(away(directory.name)), ignore_errors=True)
    return True


def _fetch(store: Store, directory: Path, told: Told) -> None:
    source = f"{FOLDER}/{directory.name}"
    index = _index(store.read(f"{source}/{FILES}"), store.locate(source))
    if META not in index:
        where = store.locate(source)
        raise UserError(f"data: {where}/{FILES} names no prepared data: remove {where}, and it is prepared again")
    _fetch_all(store, source, index, directory, told)


def push_columns(store: Store, directory: Path, name: str, made: Mapping[str, Written]) -> None:
    """Say in the store that the columns which a model has made of prepared rows are all there.

    Args:
        name: of their folder, within the data's.
        made: their files, which `put_columns` has stored.
    """
    index = {file: [each.size, each.sha256] for file, each in made.items()}
    target = f"{FOLDER}/{directory.name}/{name}/{FILES}"
    stores.repeated(lambda: store.write(target, [json.dumps(index).encode()]))


def put_columns(store: Store, directory: Path, name: str, file: Path) -> Written:
    """Store one file of such columns."""
    target = f"{FOLDER}/{directory.name}/{name}/{file.name}"
    return stores.repeated(lambda: store.write(target, chunks(file)))


def fetch_columns(store: Store, directory: Path, name: str, told: Told = _unheard) -> bool:
    """Have such columns beside the prepared data on this node's disk; return whether they are stored, all of them.

    Raises:
        UserError, OSError: as `fetch`.
    """
    source = f"{FOLDER}/{directory.name}/{name}"
    if not store.exists(f"{source}/{FILES}"):
        return False
    with _alone(directory.with_name(f".{directory.name}.lock")):
        if not (directory / name).is_dir():
            index = _index(store.read(f"{source}/{FILES}"), store.locate(source))
            _fetch_all(store, source, index, directory / name, told)
    return True


def _fetch_all(store: Store, source: str, index: Mapping[str, Kept], directory: Path, told: Told) -> None:
    """Fetch files into a folder that gets its name when they are whole."""
    where, aside = store.locate(source), directory.with_name(f".{directory.name}.fetched")
    shutil.rmtree(aside, ignore_errors=True)  # a process that was killed left it
    total = sum(each.size for each in index.values())
    _check_room(directory.parent, total, where)
    counted = _Counted(told, total)

    def one(name: str) -> None:
        wanted = index[name]
        found = _downloaded(store, f"{source}/{wanted.place}", aside / name)
        if (found.size, found.sha256) != (wanted.size, wanted.sha256):
            raise UserError(
                f"data: {where}/{wanted.place} is damaged ({found.size} bytes, SHA-256 {found.sha256[:12]}, and not "
                f"{wanted.size}, {wanted.sha256[:12]}): remove {where}, and it is prepared again"
            )
        counted.add(found.size)

    try:
        _side_by_side(one, list(index))
        try:
            os.replace(aside, directory)
        except OSError:  # a preparation on this node was faster: its data is the same
            if not ((directory / META).is_file() if META in index else directory.is_dir()):
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def bring(store: Store, name: str, files: Mapping[str, str], place: Path) -> None:
    """Have files of rows that other nodes have stored, by name and digest, in a folder.

    Raises:
        UserError: what is stored is not what they made.
    """

    def one(file: str) -> None:
        source, aside = f"{FOLDER}/{name}/{object_of(file, files[file])}", place / f".{file}.{os.getpid()}.new"
        found = _downloaded(store, source, aside)
        if found.sha256 != files[file]:
            aside.unlink()
            raise UserError(f"data: {store.locate(source)} is not what was stored there: remove it, and submit again")
        aside.replace(place / file)

    _side_by_side(one, list(files))


class _Counted:
    """Tells how many bytes are done, of files that are under way side by side."""

    def __init__(self, told: Told, total: int) -> None:
        self._told, self._total, self._done, self._lock = told, total, 0, threading.Lock()
        told(0, total)

    def add(self, size: int) -> None:
        with self._lock:
            self._done += size
            self._told(self._done, self._total)


def _side_by_side(work: Callable[[str], Any], names: list[str]) -> list[Any]:
    """Do `work` on names, AT_ONCE at a time; the first that fails ends it, once those under way have ended."""
    pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="tandem-data")
    try:
        return list(pool.map(work, names))
    finally:
        pool.shutdown(cancel_futures=True)


def _index(content: bytes, where: str) -> Mapping[str, Kept]:
    try:
        found = {
            str(name): Kept(int(size), str(digest), str(other[0]) if other else str(name))
            for name, (size, digest, *other) in json.loads(content).items()
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"data: {where}/{FILES} is damaged: remove {where}, and it is prepared again") from error
    names = [*found, *(each.place for each in found.values())]
    if any(name.startswith("/") or ".." in name.split("/") for name in names):
        raise UserError(f"data: {where}/{FILES} names no prepared data: remove {where}, and it is prepared again")
    return found


def _check_room(folder: Path, needed: int, where: str) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"data: {needed / 1e9:.3g} GB of prepared rows from {where} do not fit in {folder}, which has "
            f"{free / 1e9:.3g} GB free: make room, or set TANDEM_HOME to a folder on a larger disk"
        )


def _downloaded(store: Store, source: str, target: Path) -> Written:
    target.parent.mkdir(parents=True, exist_ok=True)
    return stores.repeated(lambda: _download(store, source, target))


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


def chunks(path: Path) -> Iterator[bytes]:
    """Yield a file's content."""
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Be the only process of this machine that fetches a data set; the lock goes with the process."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
