"""Run a sweep's trials, as many at once as there is room for, until all have ended.

loop:
    begin trials while there is room: those of an earlier attempt first, then new ones
    see what the running ones have measured; stop those that ASHA gives up, or all when the time is over
    write down which have ended, and how
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from jobs.driver.sweep.process import TrialProcess, reason
from jobs.driver.sweep.suggest import suggest
from jobs.driver.sweep.trials import Journal, Trial
from jobs.driver.sweep.tune import Halving
from jobs.run_folder import RunFolder
from jobs.spec_sweep import SweepSpec
from tracking.records import metric_name, read_records

POLL_S = 0.3


@dataclass(frozen=True)
class Ready:
    """A trial whose folder says what it is to do."""

    folder: Path
    steps: int


class Launcher(Protocol):
    """Makes trials ready to run; `runner` needs no more of the job around it."""

    def ready(self, number: int, values: dict[str, Any]) -> Ready | str:
        """Prepare a trial's folder and data; or return why it cannot be trained, in a sentence."""

    def tell(self, trial: Trial) -> None:
        """Hear that something about a trial has changed."""


class Process(Protocol):
    """A trial's process (process.py)."""

    def ended(self) -> int | None:
        """Return its exit code; None while it runs."""

    def stop(self) -> None:
        """Ask it to save and end."""

    def wait(self) -> int:
        """Wait for its end, and return its exit code."""


@dataclass
class Running:
    """A trial that runs."""

    process: Process
    folder: RunFolder
    seen: dict[str, int] = field(default_factory=dict)
    """How far its metrics have been read."""
    stopped_as: str = ""
    """How it will have ended, once it has saved: "stopped" or "out of time"."""


class Runner:
    """Runs the trials of one sweep."""

    def __init__(
        self,
        sweep: SweepSpec,
        mode: str,
        journal: Journal,
        launcher: Launcher,
        parallel: int,
        begin: Callable[[Path], Process] = TrialProcess,
        poll_s: float = POLL_S,
        first: Mapping[str, Any] | None = None,
    ) -> None:
        """Take a sweep, and the journal of what an earlier attempt did.

        Args:
            mode: "max" or "min": which way the metric is better.
            parallel: how many trials may run at once.
            begin: starts the trial of a folder.
            poll_s: how often to look at those that run.
            first: the values of the first trial, if they are not to be drawn.
        """
        self._sweep, self._mode, self._journal = sweep, mode, journal
        self._launcher, self._parallel = launcher, parallel
        self._begin_trial, self._poll_s, self._first = begin, poll_s, first
        self._halving = Halving(sweep.scheduler, mode)
        self._running: dict[int, Running] = {}
        self._is_ending = False
        self._ends_at = time.monotonic() + (sweep.time_budget_s or math.inf)

    def run(self) -> None:
        """Make all trials, or as many as the time allows."""
        self._replay()
        while self._begin() or self._running:
            self._look()
            time.sleep(self._poll_s)

    def end(self) -> None:
        """Have the trials that run save and end, and wait for them; they go on when the sweep does."""
        self._is_ending = True
        for running in self._running.values():
            running.process.stop()
        for number, running in list(self._running.items()):
            code = running.process.wait()
            self._measure(number, running)
            self._settle(number, running.folder, running.stopped_as, code)

    def _replay(self) -> None:
        """Bring the scheduler to where an earlier attempt was; what it would have stopped then has stopped."""
        for trial in list(self._journal.trials):
            given_up = False
            for count, (_, value) in enumerate(trial.evaluations, 1):
                given_up = self._halving.stops(trial.number, count, value)
            if given_up and trial.ended is None:
                self._note(trial.number, ended="stopped")

    def _begin(self) -> bool:
        """Begin trials while there is room; say whether any may still begin."""
        while len(self._running) < self._parallel:
            number = self._next()
            if number is None:
                return False
            self._start(number)
        return self._next() is not None

    def _next(self) -> int | None:
        """Return the number of the trial to begin: one of before that has not ended, or a new one."""
        if time.monotonic() > self._ends_at:
            return None
        known = self._journal.trials
        left = (trial.number for trial in known if trial.ended is None and trial.number not in self._running)
        return next(left, len(known) if len(known) < self._sweep.count else None)

    def _start(self, number: int) -> None:
        known = self._journal.trials
        is_new = number == len(known)
        new = suggest(self._sweep, number, known, self._mode, self._first) if is_new else {}
        values = new or dict(known[number].values)
        ready = self._launcher.ready(number, values)
        if isinstance(ready, str):
            self._note(number, values=values, ended="failed", reason=ready)
            return
        self._note(number, values=values, run=ready.folder.name, steps=ready.steps)
        folder = RunFolder(ready.folder, resumed=True)
        if folder.status() == "FINISHED":  # at the moment when the sweep's driver died
            self._settle(number, folder)
        else:
            self._running[number] = Running(self._begin_trial(ready.folder), folder)

    def _look(self) -> None:
        """See what the running trials have measured, and which have ended."""
        for number, running in list(self._running.items()):
            code = running.process.ended()
            self._measure(number, running)
            if code is not None:
                self._settle(number, running.folder, running.stopped_as, code)
            elif time.monotonic() > self._ends_at and not running.stopped_as:
                self._stop(running, "out of time")

    def _stop(self, running: Running, how: str) -> None:
        running.stopped_as = how
        running.process.stop()

    def _measure(self, number: int, running: Running) -> None:
        """Write new evaluations down, and stop the trial if they are not good enough to go on."""
        key = metric_name(f"eval_{self._sweep.metric}")
        records, running.seen = read_records(running.folder.spool, running.seen, limit=1 << 62)
        for record in records:
            trial = self._journal.trials[number]
            if key not in record.metrics or record.step <= max((s for s, _ in trial.evaluations), default=0):
                continue
            trial = self._note(number, step=record.step, value=record.metrics[key])
            given_up = self._halving.stops(number, len(trial.evaluations), record.metrics[key])
            if given_up and record.step < trial.steps and not running.stopped_as:
                self._stop(running, "stopped")

    def _settle(self, number: int, folder: RunFolder, stopped_as: str = "", code: int = 0) -> None:
        """Write down how a trial has ended; one that was stopped by a signal, alone or with the sweep, has not.

        Args:
            stopped_as: how it was to end, if the sweep stopped it.
            code: its process's exit code.
        """
        self._running.pop(number, None)
        status, final = folder.status(), (folder.evaluations() or {}).get("final")
        if status == "FINISHED" and final is not None:
            self._note(number, ended="finished", value=final.get(self._sweep.metric))
        elif stopped_as:
            self._note(number, ended=stopped_as)
        elif status != "KILLED" and not self._is_ending:
            self._note(number, ended="failed", reason=reason(folder.path, code))

    def _note(self, number: int, **event: Any) -> Trial:
        trial = self._journal.add({"trial": number, **event})
        self._launcher.tell(trial)
        return trial
