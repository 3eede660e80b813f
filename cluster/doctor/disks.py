"""Free space of the folders that jobs write, and how fast the disks below them are."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from cluster.doctor.facts import Disk

MEMORY_FOLDER = "/dev/shm"
"""Where Ray's object store and the workers of data loaders keep what they share; memory, so its speed is not asked."""
SECONDS = 0.4
"""So long each direction is measured, at most, and a second all in all."""
MOST_BYTES = 128 << 20
BLOCK = 1 << 20
SHARE = 0.1
"""Of the free space that is used at most."""


def looked_at(folders: Iterable[str], timed: bool) -> tuple[Disk, ...]:
    """Look at each folder's disk, each disk once; a folder that is not there stands for the nearest one above it.

    Args:
        timed: whether to write to it for as long as SECONDS and read it back; nothing stays.
    """
    seen: set[int] = set()
    found = []
    for folder in folders:
        place = _nearest(Path(folder))
        try:
            device = place.stat().st_dev
            if device not in seen:
                found.append(_disk(folder, place, timed and not folder.startswith(MEMORY_FOLDER)))
            seen.add(device)
        except OSError as error:
            found.append(Disk(folder, 0, 0, error=error.strerror or str(error)))
    return tuple(found)


def _nearest(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())


def _disk(folder: str, place: Path, timed: bool) -> Disk:
    usage = shutil.disk_usage(place)
    if not timed:
        return Disk(folder, usage.free, usage.total)
    most = min(MOST_BYTES, int(usage.free * SHARE)) // BLOCK * BLOCK
    if most < BLOCK:
        return Disk(folder, usage.free, usage.total, error="too full to be measured")
    try:
        written, read, how = _speed(place, most)
    except OSError as error:
        return Disk(folder, usage.free, usage.total, error=f"not measured: {error.strerror or error}")
    return Disk(folder, usage.free, usage.total, written, read, how)


def _speed(place: Path, most: int) -> tuple[float, float, str]:
    """Return bytes a second written and read, and how the page cache was kept out of it."""
    descriptor, name = tempfile.mkstemp(prefix=".tandem-doctor-", dir=place)
    try:
        how = "O_DIRECT" if _go_direct(descriptor) else "fsync, and the page cache dropped before reading"
        with mmap.mmap(-1, BLOCK) as block:  # page-aligned, as O_DIRECT wants it
            block.write(os.urandom(BLOCK))
            written = _timed(lambda: os.write(descriptor, block), most, lambda: os.fsync(descriptor))
            total = os.lseek(descriptor, 0, os.SEEK_CUR)
            with contextlib.suppress(OSError, AttributeError):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.lseek(descriptor, 0, os.SEEK_SET)
            read = _timed(lambda: os.readv(descriptor, [block]), total, lambda: None)
        return written, read, how
    finally:
        os.close(descriptor)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def _go_direct(descriptor: int) -> bool:
    """Have reads and writes pass the page cache, where the system and the file system can; say whether they do."""
    try:
        import fcntl

        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
    except (OSError, AttributeError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
        return False
    return True


def _timed(step: object, most: int, last: object) -> float:
    """Return bytes a second of repeated steps, of which `last` is part of the time."""
    assert callable(step)
    assert callable(last)
    began, done = time.perf_counter(), 0
    while done < most and time.perf_counter() - began < SECONDS:
        count = step()
        if not count:
            break
        done += count
    last()
    return done / max(time.perf_counter() - began, 1e-9)
