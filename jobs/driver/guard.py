"""What ends a job's MLflow run when its driver cannot: killed, out of memory, gone with its shell.

    python -m jobs.driver.guard RUN_FOLDER     started by the driver, with a pipe from it as standard input

A small process of its own session that waits for the pipe to close. If the driver has not noted an end by then, the
guard sends what is left of the spool, says in the run what happened and ends it as FAILED.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from jobs.run_folder import RunFolder

PATIENCE = 60
"""Attempts, 5 s apart; then `tandem tracking sync` has to do it."""


def start(folder: RunFolder) -> subprocess.Popen[bytes]:
    """Start the guard of this process. Its pipe closes with this process, however that ends."""
    command = [sys.executable, "-m", "jobs.driver.guard", str(folder.path)]
    log = folder.guard_log.open("ab")
    with log:
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True, env=dict(os.environ)
        )


def main(path: Path) -> None:
    """Wait for the driver's end; then end the run if the driver has not."""
    sys.stdin.buffer.read()
    folder = RunFolder(path, resumed=True)
    key = folder.key
    if folder.status() != "RUNNING":
        return
    folder.write_status("FAILED")
    from tracking import outbox
    from tracking.errors import TrackingError
    from tracking.run import Run

    outbox.note(folder.spool, outbox.Ending(key, key, "FAILED"))
    for _ in range(PATIENCE):
        try:
            run = Run.open(key, key)
            run.set_tags({"tandem.error": "the driver of the job died without a word"})
            run.log_text(page(folder), "post-mortem.md")
            outbox.settle(folder.spool)
            return
        except TrackingError as error:
            print(error, flush=True)
            time.sleep(5)


def page(folder: RunFolder) -> str:
    """Write the post-mortem of a driver that said nothing."""
    from jobs.driver import postmortem

    return postmortem.page(folder, ending="The driver of the job died without a word (killed, or out of memory).")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
