"""Who owns a run that is kept in an object store: what jobs/lease.py is for a folder.

    <store>/runs/<run>/lease/…      what lies there, and why one contender wins: jobs/lease_contest.py

No object store can be asked through pyarrow to write only what is not there, so a run is not taken by creating a
number: contenders agree on one. The number is a fence all the same: it only ever grows, no two owners have the same,
and whoever finds a higher one than its own has lost the run. To ask for it is one list.

The owner writes its claim anew every BEAT_S. A store that is away, for however long, takes nothing away from it: it
goes on when the store is back, unless another has taken the run by then, which takes STALE_S of looks that succeed.
"""

from __future__ import annotations

import secrets
import threading
import time
from dataclasses import replace
from functools import partial
from typing import Any

from cluster import stores
from jobs import lease, lease_contest, lease_objects, progress
from jobs.checkpoint.store import Store
from jobs.lease import Held, Owner, RunIsOwned
from jobs.lease_contest import List, Now, Owned, Read, Remove, Standing, Step, Steps, Timing, Wait, Won, World, Write

BEAT_S = lease.BEAT_S
STALE_S = lease.STALE_S


class StoreLease(Held):
    """The lease of a run in an object store."""

    def __init__(self, store: Store, run: str, owner: Owner, won: Won, timing: Timing) -> None:
        super().__init__(won.claim.number, timing.beat_s)
        self._store, self._run, self._owner, self._timing = store, run, owner, timing
        self._claim, self._beats = won.claim, won.beats
        self._writing = threading.Lock()  # a sign of life must not come after "released"
        self._shown_at = time.monotonic()
        self._complained = False

    def held(self) -> bool:
        """Say whether nobody has taken the run since.

        Raises:
            OSError: the store does not answer.
        """
        return newest(self._store, self._run) == self.number

    def release(self) -> None:
        """Let go: the run is free."""
        self._ending.set()
        with self._writing:
            try:
                stores.repeated(partial(self._write, replace(self._owner, released=True)))
            except Exception as error:  # whatever a store throws; this process ends, and is seen to be silent
                progress.say(f"the store could not be told that the run {self._run} is free: {error}")

    def _show(self) -> None:
        with self._writing:
            if not self._ending.is_set():
                self._write(self._owner)
        self._shown_at, self._complained = time.monotonic(), False

    def _write(self, owner: Owner) -> None:
        self._beats += 1
        self._store.write(f"{_folder(self._run)}/{self._claim}", [lease_objects.content(owner, self._beats)])

    def _failed(self, error: Exception) -> None:
        silent_s = time.monotonic() - self._shown_at
        if silent_s > self._timing.valid_s and not self._complained:
            self._complained = True
            progress.say(
                f"{self._store.locate(f'runs/{self._run}')} does not answer for {silent_s:.0f} s now ({error}); the "
                "run goes on, unless another job takes it meanwhile"
            )


def take(
    store: Store, run: str, job: str = "", *, beat_s: float | None = None, stale_s: float | None = None
) -> StoreLease:
    """Take the lease of a run for this process.

    One that is held elsewhere is watched for a sign of life, for STALE_S at least.

    Args:
        run: its key.
        job: id of the Ray job, for whoever is refused.
        beat_s: BEAT_S, or what all that contend for the run have instead.
        stale_s: likewise.

    Raises:
        RunIsOwned: another process works on the run.
        OSError: the store does not answer.
    """
    timing = Timing.of(beat_s or BEAT_S, stale_s or STALE_S)
    me = lease.this_process(job)
    world = World(
        me,
        timing,
        token=lambda: secrets.token_hex(8),
        standing=standing,
        on_wait=lambda owner: progress.say(lease.waiting(run, owner, timing.stale_s)),
    )
    try:
        won = _done(store, run, lease_contest.contend(world))
    except Owned as owned:
        raise RunIsOwned(lease.refusal(run, owned.owner, stopped=owned.stopped)) from None
    return StoreLease(store, run, me, won, timing)


def newest(store: Store, run: str) -> int:
    """Return the number of the lease that counts; 0 where there is none yet.

    Raises:
        OSError: the store does not answer.
    """
    return lease_objects.newest(lease_objects.parsed(store.files(_folder(run))))


def standing(owner: Owner) -> Standing:
    """Say what is seen from here of an owner's process."""
    if not owner.is_here():
        return "elsewhere"
    if not owner.lives():
        return "gone"
    return "stopped" if owner.is_stopped() else "lives"


def _done(store: Store, run: str, steps: Steps[Won]) -> Won:
    """Take a contender's steps in a store."""
    answer: Any = None
    while True:
        try:
            step = steps.send(answer)
        except StopIteration as end:
            won: Won = end.value
            return won
        answer = _taken(store, _folder(run), step)


def _taken(store: Store, folder: str, step: Step) -> Any:
    match step:
        case Now():
            return time.monotonic()
        case Wait(seconds):
            return time.sleep(seconds)
        case List():
            return store.files(folder)
        case Read(name):
            return _read(store, f"{folder}/{name}")
        case Write(name, content):
            return stores.repeated(lambda: store.write(f"{folder}/{name}", [content]))
        case Remove(name):
            return store.remove_files(folder, name)


def _read(store: Store, name: str) -> bytes | None:
    try:
        return store.read(name)
    except FileNotFoundError:
        return None


def _folder(run: str) -> str:
    return f"runs/{run}/{lease.FOLDER}"
