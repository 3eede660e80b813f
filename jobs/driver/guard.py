"""What ends a job's MLflow run when its driver cannot: killed, out of memory, stopped while it hung.

    python -m jobs.driver.guard RUN_FOLDER LEASE     started by the driver, with a pipe from it as standard input

A small process that waits for the pipe to close. If nothing came through it by then and no end is noted, the guard
sends what is left of the spool, says in the run what happened and ends it as FAILED, or as KILLED if it had been asked
to stop. What comes through it is that the driver has ended the run itself; a full disk would not take a note of that.

It is no child of the driver: `ray job stop` ends a job's whole tree of processes, whatever their sessions, so a shell
starts it and ends at once. It speaks only for the lease (jobs/lease.py) that its driver held.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from jobs import deaths, lease
from jobs.driver.standstill import ATTEMPT, WAY_OUT
from jobs.run_folder import RunFolder

PATIENCE = 60
"""Attempts, 5 s apart; then `tandem tracking sync` has to do it."""
ORPHAN = 'exec 3<&0; "$@" <&3 3<&- &'
"""A shell gives what it leaves in the background an empty input, unless another descriptor holds the pipe."""
DIED = "the driver of the job died without a word (killed, or out of memory)"
FOR_MEMORY = "the driver of the job died without a word, and the kernel of its machine killed for memory meanwhile"
HUNG = f"the preparation of the data hung, and the driver was ended for it; {WAY_OUT}"
OVERDUE = "the job was asked to stop and did not within the cluster's limit, so it was killed"


def start(folder: RunFolder, number: int) -> int:
    """Start the guard of this process, which holds lease `number`. Its pipe closes with this process, however it ends.

    Returns:
        The end of the pipe that stays here, for `dismiss`: a bare descriptor on purpose, which nothing closes before
        the process ends.
    """
    reading, writing = os.pipe()
    command = [sys.executable, "-m", "jobs.driver.guard", str(folder.path), str(number)]
    try:
        with folder.guard_log.open("ab") as log:
            subprocess.run(
                ["/bin/sh", "-c", ORPHAN, "sh", *command],
                stdin=reading,
                stdout=log,
                stderr=log,
                start_new_session=True,
                check=True,
            )
    finally:
        os.close(reading)
    return writing


@contextmanager
def guarded(folder: RunFolder, number: int) -> Iterator[None]:
    """Have a guard meanwhile; at the end, however it comes, the driver has ended the run itself."""
    pipe = start(folder, number)
    try:
        yield
    finally:
        dismiss(pipe)


def dismiss(pipe: int) -> None:
    """Tell the guard that the run has been ended, and how is known."""
    with suppress(OSError):  # it is gone
        os.write(pipe, b".")


def main(path: Path, number: int) -> None:
    """Wait for the driver's end; then end the run if the driver has not, and nobody goes on with it."""
    kills = deaths.oom_kills()
    if sys.stdin.buffer.read():
        return
    for_memory = deaths.oom_kills() > kills
    folder = RunFolder(path, resumed=True)
    with suppress(OSError):  # a store that does not answer: `tell` asks again
        if lease.newest(path) != number:
            return
    from tracking import outbox  # not before it is needed: guards are many, and should be small

    if folder.status() != "RUNNING":  # the driver died while it told MLflow
        if outbox.is_noted(folder.spool):
            tell(folder, number)
        _store(folder, number)
        return
    stopped = folder.stop_requested()
    status, reason = ending_of(stopped=stopped, hung=folder.hung_attempts(), for_memory=for_memory)
    with suppress(OSError):  # a full disk: the tracking server has to know all the same
        folder.write_status(status)
    with suppress(OSError):
        outbox.note(folder.spool, outbox.Ending(folder.key, folder.key, status))
    tell(folder, number, reason)
    _store(folder, number)


def _store(folder: RunFolder, number: int) -> None:
    """Have the run's notes stored as they are now, where they are kept in an object store."""
    if uri := lease.stored_in(folder.path):
        from jobs.storage.keeper import Keeper, NotKept

        with suppress(NotKept, OSError):
            Keeper(uri, folder.path, is_mine=lambda: lease.newest(folder.path) == number).settle()


def tell(folder: RunFolder, number: int, reason: str = "") -> None:
    """End the run in MLflow as noted, for as long as lease `number` is the newest.

    Args:
        reason: why the driver could not, if it had not come to its end.
    """
    from tracking import outbox
    from tracking.errors import TrackingError
    from tracking.run import Run

    for _ in range(PATIENCE):
        try:
            if lease.newest(folder.path) != number:
                return  # somebody goes on with it, and will end it
            if reason:
                run = Run.open(folder.key, folder.key)
                run.set_tags({"tandem.error": reason})
                run.log_text(page(folder, reason), "post-mortem.md")
            outbox.settle(folder.spool)
            return
        except (TrackingError, OSError) as error:
            print(error, flush=True)
            time.sleep(5)


def ending_of(
    *, stopped: bool, hung: Collection[str], for_memory: bool = False
) -> tuple[Literal["KILLED", "FAILED"], str]:
    """Return how a run whose driver said nothing has ended, and why. Pure.

    Args:
        stopped: the job had been asked to stop.
        hung: the attempts that left stacks.
        for_memory: since the driver began, its kernel has killed some process for memory.
    """
    if stopped:
        return "KILLED", OVERDUE
    if ATTEMPT in hung:
        return "FAILED", HUNG
    return "FAILED", FOR_MEMORY if for_memory else DIED


def page(folder: RunFolder, reason: str = DIED) -> str:
    """Write the post-mortem of a driver that said nothing."""
    from jobs.driver import postmortem

    return postmortem.page(folder, ending=f"{reason[0].upper()}{reason[1:]}.")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
