"""The process of a trial: a driver like any job's, started by the sweep's and ending with it (trial.py)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from jobs.driver.job import Part

REQUEST, LOG = Part.REQUEST, Part.LOG
TAIL_BYTES = 1 << 16


class TrialProcess:
    """A trial that runs."""

    def __init__(self, folder: Path) -> None:
        """Start what `ask` has written into the trial's folder."""
        self.folder = folder
        command = [sys.executable, "-m", "jobs.driver.sweep.trial", str(folder)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # code beside the spec
        with (folder / LOG).open("ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment)

    def ended(self) -> int | None:
        """Return its exit code; None while it runs."""
        return self._process.poll()

    def stop(self) -> None:
        """Ask it to save and end, as a job is asked."""
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """Wait for its end, and return its exit code."""
        return self._process.wait()


def ask(spec: Mapping[str, Any], base: Path, part: Part) -> None:
    """Make a trial's folder, and write down what it is to do.

    Args:
        spec: an ordinary job's, resolved.
        base: where its relative paths start.
    """
    part.folder.mkdir(parents=True, exist_ok=True)
    partial = part.folder / f".{REQUEST}.partial"
    besides = {"tags": part.tags, "model": part.model, "origin": part.origin}
    partial.write_text(json.dumps({"spec": spec, "base": str(base), "part": besides}), encoding="utf-8")
    partial.replace(part.folder / REQUEST)


def asked(folder: Path) -> tuple[dict[str, Any], Path, Part]:
    """Return what `ask` has written: the spec, where its paths start, and what the trial is beside its spec."""
    request = json.loads((folder / REQUEST).read_text(encoding="utf-8"))
    return request["spec"], Path(request["base"]), Part(folder, **request["part"])


def reason(folder: Path, code: int) -> str:
    """Return why a trial failed: the last thing that its driver said."""
    with suppress(OSError), (folder / LOG).open("rb") as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - TAIL_BYTES))
        return last_word(log.read().decode("utf-8", "replace"), code)
    return last_word("", code)


def last_word(log: str, code: int) -> str:
    """Return the error in a driver's log: its own sentence, or the last line of a traceback. Pure."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    told = [line.removeprefix("tandem: error: ") for line in lines if line.startswith("tandem: error: ")]
    if told:
        return told[-1]
    if code < 0:
        return f"its driver was ended by {signal.Signals(-code).name}"
    raised = [line for line in lines if line.partition(":")[0].rpartition(".")[2].endswith(("Error", "Exception"))]
    return raised[-1] if raised else f"its driver ended with exit code {code}"
