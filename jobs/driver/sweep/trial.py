"""The driver of one trial: `python -m jobs.driver.sweep.trial FOLDER`, started by the sweep's driver (process.py).

It does what the driver of any job does, in a folder that is there already. Its standard input is a pipe from the
sweep's driver: when that closes, the sweep is gone, and the trial ends as a driver that was killed does: its guard ends
its run, and the sweep that goes on has it go on from its newest checkpoint.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

from cluster.errors import UserError
from jobs import noise, progress
from jobs.driver import main as driver
from jobs.driver import stopping, warm
from jobs.driver.sweep.process import asked
from jobs.spec import JobSpec


def main(folder: Path) -> int:
    """Run the trial whose request lies in a folder; return the exit code."""
    noise.quiet()
    if (code := warm.shadow("jobs.driver.sweep.trial")) is not None:
        return code
    values, base, part = asked(folder)
    try:
        spec = JobSpec.model_validate(values)
        stopping.end_before_it_begins()
        threading.Thread(target=_end_with_sweep, name="tandem-sweep", daemon=True).start()
        placed = driver.connect_and_place(spec)
        from jobs.driver import attempt

        return attempt.run_job(spec, base, placed, part)
    except UserError as error:
        progress.say(f"error: {error}")
        return error.exit_code


def _end_with_sweep() -> None:
    while os.read(0, 1):  # not through sys.stdin, whose lock a thread may not hold when the interpreter ends
        pass
    os._exit(1)


if __name__ == "__main__":
    driver.leave(main(Path(sys.argv[1])))
