"""Locks that killed builds of torch extensions have left behind: later builds would wait on them for ever.

torch's FileBaton makes a file `lock` in the extension's folder, keeps it open while it builds, and removes it after.
Nothing is written into it: its owner is whoever has it open. So it is stale where no process of this machine has.
"""

from __future__ import annotations

import os
from pathlib import Path


def owners(lock: Path) -> list[int]:
    """Return the processes of this machine that have a file open, as far as this user may see."""
    wanted = lock.stat()
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and any(_same(opened, wanted) for opened in _opened(process)):
            found.append(int(process.name))
    return found


def remove_stale(root: Path) -> list[Path]:
    """Remove the locks below a folder of extensions, on this machine's disk, that nobody has open; return them.

    One that belongs to another user stays: whether its owner lives cannot be seen.
    """
    removed = []
    for lock in sorted(root.glob("*/lock")):
        try:
            if lock.stat().st_uid == os.getuid() and not owners(lock):
                lock.unlink()
                removed.append(lock)
        except FileNotFoundError:  # its build has just ended
            continue
    return removed


def _opened(process: Path) -> list[Path]:
    try:
        return list((process / "fd").iterdir())
    except OSError:  # it has ended, or is another user's
        return []


def _same(opened: Path, wanted: os.stat_result) -> bool:
    try:
        found = opened.stat()
    except OSError:  # closed since
        return False
    return (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino)
