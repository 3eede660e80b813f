"""Which folder an attempt at a spec runs in, and that it alone does."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from jobs import lease, progress, store_lease
from jobs.checkpoint.store import Store
from jobs.lease import Lease
from jobs.notes import write
from jobs.run_folder import RunFolder
from jobs.spec import JobSpec
from jobs.storage.keeper import Keeper
from jobs.store_lease import StoreLease


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


def claim_stored(uri: str, root: Path, spec: JobSpec, job: str = "") -> tuple[RunFolder, StoreLease, Keeper]:
    """Do the same where the storage is an object store; the run's notes are in its folder below `root` then.

    Returns:
        The folder, the lease, and who keeps the folder's notes in the store.

    Raises:
        RunIsOwned: another process works on it.
        OSError: the store does not answer.
    """
    store = Store(uri)
    while True:
        key, status = _choose_stored(store, spec)
        claimed = _taken(store, uri, root / "runs" / key, status, job)
        if claimed is None:
            continue
        folder, owned, keeper = claimed
        if folder.status() != "FINISHED":
            return folder, owned, keeper
        owned.release()  # its owner has just finished it


def claim_stored_folder(
    uri: str, path: Path, job: str = "", own: Collection[str] = ()
) -> tuple[RunFolder, StoreLease, Keeper]:
    """Return what `claim_stored` does of a folder that was made for one run, a sweep's trial.

    Args:
        own: files in the folder that are this attempt's: they stay as they are.

    Raises:
        RunIsOwned: another process works on it.
        OSError: the store does not answer.
    """
    store = Store(uri)
    while (claimed := _taken(store, uri, path, _status(store, path.name), job, own)) is None:
        pass
    return claimed


def _taken(
    store: Store, uri: str, path: Path, status: str | None, job: str, own: Collection[str] = ()
) -> tuple[RunFolder, StoreLease, Keeper] | None:
    """Take a run that is stored, and bring its notes; None where that took so long that this process was given up."""
    owned = store_lease.take(store, path.name, job)
    keeper = Keeper(uri, path, progress.say, owned.held)
    folder = RunFolder(path, resumed=status is not None, lease=owned.number)
    keeper.bring(newest=lease.noted(path) == owned.number - 1, own=own)
    if not owned.held():
        return None
    write(path / lease.STORED, {"uri": uri, "lease": owned.number})
    return folder, owned, keeper


def _choose_stored(store: Store, spec: JobSpec) -> tuple[str, str | None]:
    """Return the name of the run that goes on or begins, and how the one that goes on stands."""
    stem = f"{spec.name}-{spec.digest()[:8]}"
    found = store.folders("runs")
    numbers = [
        int(number) for name in found if (number := name.removeprefix(f"{stem}-")).isdigit() and name.startswith(stem)
    ]
    newest = f"{stem}-{max(numbers, default=0)}"
    if numbers and spec.checkpoint.resume == "auto" and (status := _status(store, newest)) != "FINISHED":
        return newest, status or "RUNNING"
    return f"{stem}-{max(numbers, default=0) + 1}", None


def _status(store: Store, key: str) -> str | None:
    try:
        return str(json.loads(store.read(f"runs/{key}/status.json"))["status"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


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
