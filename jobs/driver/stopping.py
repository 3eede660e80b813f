"""A job that is asked to stop: by `ray job stop`, which sends SIGTERM, or by SIGINT to its driver."""

from __future__ import annotations

import os
import signal
from typing import Any

from jobs import progress
from jobs.run_folder import RunFolder

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """The job was asked to stop, and did. No `except Exception` round a bad row may take it for that row's fault."""


class Stop:
    """Whether this job was asked to stop, and what follows.

    Workers that train are asked for a checkpoint and an end. Whatever else a phase does ends at once: it has nothing to
    save. Before a phase the request waits for it, after it nothing is left to stop; a second one changes nothing.
    """

    def __init__(self, folder: RunFolder, *, trains: bool) -> None:
        self.asked = False
        self._folder, self._trains = folder, trains
        self._in_phase = False

    def listen(self) -> None:
        """Take the signals of this process from now on; Ray blocks SIGINT in all of its processes."""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def __enter__(self) -> None:
        self._in_phase = True
        if self.asked:
            raise Stopped

    def __exit__(self, *error: object) -> None:
        self._in_phase = False

    def _on_signal(self, signum: int, frame: Any) -> None:
        if self.asked:
            return
        self.asked = True
        self._tell()
        if not self._in_phase:
            return
        if self._trains and self._folder.attempt() is not None:
            progress.say("asked to stop: a checkpoint is written first")
            return
        raise Stopped

    def _tell(self) -> None:
        """Leave the request for the workers and the guard; without a storage, the phase ends unsaved."""
        try:
            self._folder.request_stop()
        except OSError as error:
            progress.say(f"asked to stop, but {self._folder.path} cannot be written ({error}): no checkpoint")
            if self._in_phase:
                raise Stopped from error


def end_before_it_begins() -> None:
    """Until there is a run, let the signals end this process with a sentence."""

    def end(signum: int, frame: Any) -> None:
        progress.say("stopped before it began")
        os._exit(1)

    for number in SIGNALS:
        signal.signal(number, end)
