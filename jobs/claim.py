"""Which folder an attempt at a spec runs in, and that it alone does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from jobs import lease
from jobs.lease import Lease
from jobs.run_folder import RunFolder
from jobs.spec import JobSpec


def claim(storage: Path, spec: JobSpec, job: str = "") -> tuple[RunFolder, Lease]:
    """Return the folder for a new attempt at `spec`, and the lease that makes this process its only owner.

    It is the unfinished one of the same spec, or a new one: one that was stopped goes on in its own folder, one that
    finished is never written again.

    Args:
        job: id of the Ray job, for whoever is refused.

    Raises:
        RunIsOwned: another process works on it.
    """
    while True:
        folder = _choose(storage / "runs", spec)
        owned = lease.take(folder.path, job)
        if folder.status() != "FINISHED":
            return replace(folder, lease=owned.number), owned
        owned.release()  # its owner has just finished it


def claim_folder(path: Path, job: str = "") -> tuple[RunFolder, Lease]:
    """Return a folder that was made for one run, a sweep's trial, and the lease as `claim` does.

    Raises:
        RunIsOwned: another process works on it.
    """
    owned = lease.take(path, job)
    return RunFolder(path, resumed=RunFolder(path).status() is not None, lease=owned.number), owned


def _choose(root: Path, spec: JobSpec) -> RunFolder:
    stem = f"{spec.name}-{spec.digest()[:8]}"
    numbers = [int(number) for path in root.glob(f"{stem}-*") if (number := path.name.rpartition("-")[2]).isdigit()]
    newest = root / f"{stem}-{max(numbers, default=0)}"
    unfinished = RunFolder(newest, resumed=True)
    if numbers and spec.checkpoint.resume == "auto" and unfinished.status() != "FINISHED":
        return unfinished
    following = root / f"{stem}-{max(numbers, default=0) + 1}"
    try:
        following.mkdir(parents=True)
    except FileExistsError:  # made by another driver at this moment; its lease decides
        return _choose(root, spec)
    return RunFolder(following)
