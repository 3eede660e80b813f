"""What ends a job's MLflow run when its driver cannot: killed, out of memory, gone with its shell.

    python -m jobs.guard RUN_FOLDER RUN_KEY     started by the driver, with a pipe from it as standard input

A small process of its own session that waits for the pipe to close. If the driver has not noted an end by then, the
guard sends what is left of the spool, says in the run what happened and ends it as FAILED.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def start(folder: Path, key: str) -> subprocess.Popen[bytes]:
    """Start the guard of this process. Its pipe closes with this process, however that ends."""
    command = [sys.executable, "-m", "jobs.guard", str(folder), key]
    log = (folder / "guard.log").open("ab")
    with log:
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True, env=dict(os.environ)
        )


def main(folder: Path, key: str) -> None:
    """Wait for the driver's end; then end the run if the driver has not."""
    sys.stdin.buffer.read()
    from jobs import runs

    state = runs.RunFolder(folder, resumed=True)
    if state.status() != "RUNNING":
        return
    state.write_status("FAILED")
    from tracking.run import Run
    from tracking.spool import SpoolSender

    sender = SpoolSender(folder / "spool", lambda: Run.open(key, key), interval_s=0.2, batch_s=0.2)
    sender.defer(lambda run: run.set_tags({"tandem.error": "the driver of the job died without a word"}))
    sender.defer(lambda run: run.log_text(page(folder), "post-mortem.md"))
    sender.start()
    sender.stop(drain_timeout_s=300)
    if sender.run is not None:
        sender.run.end("FAILED")


def page(folder: Path) -> str:
    """Write the post-mortem of a driver that said nothing."""
    from jobs import postmortem

    return postmortem.page(folder, ending="The driver of the job died without a word (killed, or out of memory).")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
