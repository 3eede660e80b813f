"""Who owns a run: one process at a time, and everybody can tell which.

    <run folder>/lease/00000001.json     the first owner: host, process, job, since when; then whether it let go
                       00000002.json     the next one; the highest number owns the run

A lease is taken by creating the next number, which only one of several can do, also on a network file system, and only
where the one before has been let go or its owner is gone. Nothing is deleted for it, so nobody can take away what a
faster one has just taken. The number is a fence: whoever finds a higher one than its own has lost the run.

An owner on this machine is gone when its process is; one elsewhere when it has not touched its lease for STALE_S. Both
times of that comparison are the file system's own, so clocks that differ do not matter; nor does one that is set anew.

An owner that is stopped (SIGSTOP) keeps its run on its own machine: it may go on at any moment, and its workers do all
the while. Whoever is refused learns that it is stopped.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from cluster import processes
from cluster.errors import UserError
from jobs import progress
from jobs.notes import read

FOLDER = "lease"
STORED = "stored.json"
"""Says in a run's folder in which object store its lease is (jobs/store_lease.py); none where it is in the folder."""
BEAT_S = 5.0
STALE_S = 30.0
_NUMBER = re.compile(r"^(\d{8})\.json$")


class RunIsOwned(UserError):
    """Another process works on the run."""


@dataclass(frozen=True)
class Owner:
    """The process that holds a lease."""

    host: str
    """What its process id belongs to: a machine since it was started, or a container on it."""
    pid: int
    started_at: float
    """When the process was, in seconds since the epoch."""
    job: str
    """Id of the Ray job; empty where there is none."""
    since: str
    released: bool = False
    born: str = ""
    """What tells it from other processes of its number (cluster.processes.born); empty in leases from before it was."""

    @property
    def who(self) -> str:
        """Its name for people."""
        return f"job {self.job}" if self.job else f"process {self.pid}"

    def is_here(self) -> bool:
        """Say whether it can be seen from here whether the process lives."""
        return self.host == this_host()

    def lives(self) -> bool:
        """Say whether its process does; only for one that is here."""
        if self.born:
            return processes.born(self.pid) == self.born
        try:
            process = psutil.Process(self.pid)
            return process.create_time() == self.started_at and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def is_stopped(self) -> bool:
        """Say whether its process is stopped by a signal; only for one that is here."""
        try:
            return psutil.Process(self.pid).status() == psutil.STATUS_STOPPED
        except psutil.NoSuchProcess:
            return False


UNKNOWN = Owner("elsewhere", 0, 0.0, "", "just now")
"""The owner of a lease that shows nothing."""


class Held(ABC):
    """A run that this process owns, until it lets go of it or ends."""

    def __init__(self, number: int, beat_s: float) -> None:
        """`beat_s`: between two signs of life."""
        self.number = number
        self._beat_s = beat_s
        self._ending = threading.Event()

    @contextmanager
    def kept(self, on_lost: Callable[[], None]) -> Iterator[None]:
        """Show a sign of life every BEAT_S meanwhile, and let go at the end.

        Args:
            on_lost: called once, in a thread, should another have taken the run.
        """
        threading.Thread(target=self._beat, args=(on_lost,), name="tandem-lease", daemon=True).start()
        try:
            yield
        finally:
            self.release()

    @abstractmethod
    def held(self) -> bool:
        """Say whether nobody has taken the run since."""

    @abstractmethod
    def release(self) -> None:
        """Let go: the run is free."""

    @abstractmethod
    def _show(self) -> None:
        """Show a sign of life."""

    @abstractmethod
    def _failed(self, error: Exception) -> None:
        """Hear that it could not be asked who has the run, or no sign of life be shown; there will be another beat."""

    def _beat(self, on_lost: Callable[[], None]) -> None:
        while not self._ending.wait(self._beat_s):
            try:
                if not self.held():
                    on_lost()
                    return
                self._show()
            except Exception as error:  # a storage that is away for a moment, whatever its client throws
                self._failed(error)


class Lease(Held):
    """The lease of a run's folder."""

    def __init__(self, run: Path, number: int, owner: Owner) -> None:
        super().__init__(number, BEAT_S)
        self._run, self._owner = run, owner

    def held(self) -> bool:
        """Say whether nobody has taken the run since."""
        return newest(self._run) == self.number

    def release(self) -> None:
        """Let go: the run is free."""
        self._ending.set()
        with suppress(OSError):  # a storage that is gone: this process will be too
            _write(_file(self._run, self.number), {**asdict(self._owner), "released": True})

    def _show(self) -> None:
        os.utime(_file(self._run, self.number))

    def _failed(self, error: Exception) -> None:
        """Say nothing: what else the job writes to the disk fails too."""


def take(run: Path, job: str = "") -> Lease:
    """Take the lease of a run's folder for this process.

    One that is held elsewhere is watched for a sign of life, for STALE_S at most.

    Raises:
        RunIsOwned: another process works on the run.
    """
    mine = this_process(job)
    (run / FOLDER).mkdir(exist_ok=True)
    while True:
        number = newest(run)
        try:
            owner = _read(run, number) if number else None
            if owner is not None and not _is_free(run, number, owner):
                raise RunIsOwned(refusal(run.name, owner, stopped=owner.is_here() and owner.is_stopped()))
        except FileNotFoundError:  # taken, and taken again: there is a higher number now
            continue
        if _create(run, number + 1, mine):
            _forget(run, number - 1)
            return Lease(run, number + 1, mine)


def newest(run: Path) -> int:
    """Return the number of the lease that counts; 0 where there is none yet.

    Raises:
        OSError: the run is kept in an object store, which does not answer.
    """
    if uri := stored_in(run):
        from jobs import store_lease  # pyarrow's file systems, which most guards do without
        from jobs.checkpoint.store import Store

        return store_lease.newest(Store(uri), run.name)
    try:
        found = [_NUMBER.match(name) for name in os.listdir(run / FOLDER)]
    except FileNotFoundError:
        return 0
    return max((int(match[1]) for match in found if match), default=0)


def stored_in(run: Path) -> str | None:
    """Return the URI of the object store that a run is kept in; None where its folder is all there is."""
    return read(run / STORED).get("uri")


def noted(run: Path) -> int | None:
    """Return the number of the lease under which this machine had a run that is kept in an object store, if it had."""
    number = read(run / STORED).get("lease")
    return int(number) if number is not None else None


def this_process(job: str) -> Owner:
    """Return this process as an owner from now on."""
    me = psutil.Process()
    now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    return Owner(this_host(), me.pid, me.create_time(), job, now, born=processes.born(me.pid) or "")


def refusal(run: str, owner: Owner, *, stopped: bool = False) -> str:
    """Name the owner of a run, and what to do about it; `stopped`: its process is, by a signal. Pure."""
    asleep = f", which is stopped: kill -CONT {owner.pid} lets it go on" if stopped else ""
    ways = (
        f"follow it: tandem jobs logs {owner.job} --follow; stop it: tandem jobs stop {owner.job}; or"
        if owner.job
        else "wait for its end, or"
    )
    return (
        f"{owner.who} works on the run {run} since {owner.since} (process {owner.pid} on {owner.host.split('/')[0]}"
        f"{asleep}); {ways} set checkpoint.resume: never for a run of its own"
    )


def waiting(run: str, owner: Owner, stale_s: float) -> str:
    """Say what a contender waits for. Pure."""
    return f"waiting up to {stale_s:.0f} s for a sign of life of {owner.who}, which had the run {run}"


def this_host() -> str:
    """Return what process ids are unique in: the machine since it was started, and the container."""
    parts = [socket.gethostname(), *filter(None, [processes.boot_id()])]
    with suppress(OSError):  # no Linux
        parts.append(os.readlink("/proc/self/ns/pid"))
    return "/".join(parts)


def _is_free(run: Path, number: int, owner: Owner) -> bool:
    if owner.released or owner.is_here():
        return owner.released or not owner.lives()
    seen = _file(run, number).stat().st_mtime
    progress.say(waiting(run.name, owner, STALE_S))
    enough = time.monotonic() + STALE_S  # a lease from the future, by a clock set back since, has no age
    while _age_s(run, number) < STALE_S and time.monotonic() < enough:
        if _read(run, number).released:
            return True
        if _file(run, number).stat().st_mtime != seen:
            return False
        time.sleep(0.5)
    return True


def _age_s(run: Path, number: int) -> float:
    """Return how long ago a lease was touched, by the file system's own clock."""
    probe = run / FOLDER / f"probe-{secrets.token_hex(4)}"
    probe.touch()
    now = probe.stat().st_mtime
    probe.unlink()
    return now - _file(run, number).stat().st_mtime


def _create(run: Path, number: int, owner: Owner) -> bool:
    """Create a lease whole, unless there is one of that number: then return False."""
    whole = run / FOLDER / f"new-{secrets.token_hex(4)}"
    whole.write_text(json.dumps(asdict(owner)), encoding="utf-8")
    try:
        os.link(whole, _file(run, number))
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        return _create_empty(run, number, owner)
    finally:
        whole.unlink()
    return True


def _create_empty(run: Path, number: int, owner: Owner) -> bool:
    try:
        os.close(os.open(_file(run, number), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    _write(_file(run, number), asdict(owner))
    return True


def _read(run: Path, number: int) -> Owner:
    """Return the owner; an unknown one, elsewhere, where a lease is being written and shows nothing yet."""
    try:
        return Owner(**json.loads(_file(run, number).read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        return UNKNOWN


def _forget(run: Path, number: int) -> None:
    """Remove the leases up to `number`: they decide nothing any more."""
    for old in range(max(1, number - 1), number + 1):
        _file(run, old).unlink(missing_ok=True)


def _file(run: Path, number: int) -> Path:
    return run / FOLDER / f"{number:08d}.json"


def _write(path: Path, values: Mapping[str, Any]) -> None:
    partial = path.with_suffix(f".{secrets.token_hex(4)}")
    partial.write_text(json.dumps(values), encoding="utf-8")
    os.replace(partial, path)
