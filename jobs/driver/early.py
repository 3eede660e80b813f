"""`data.start_early`: the rest of the data is encoded, in a thread of the driver, while the workers train.

    main thread                                        the thread
    survey, fit, encode what is held out
    run the workers, which wait where they must        encode file by file; list each (jobs/data/arrivals.py)
    wait for the thread; tell what it has found        publish the folder

Where the preparation fails, the workers save a checkpoint and end, and the job ends by the preparation's own error.
Where the workers end otherwise than by themselves, the preparation ends after the chunk it is at, and its folder stays.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from jobs import progress
from jobs.data.arrivals import Arrivals
from jobs.data.prepare import Arriving, Prepared
from jobs.data.unfinished import Abandoned
from jobs.driver.job import Job
from jobs.driver.standstill import PreparationHung, sentence
from jobs.driver.stopping import Stopped

AWAY = ".early"
"""Where other nodes have rows that arrive, in the run's folder, where nodes share no folder; nobody carries it."""
LEAVE_S = 10.0
"""So long the chunk that is being encoded may take, once nobody waits for it."""


class Early:
    """The preparation that goes on while the workers train. It is an `Overlap` (jobs/data/preparation.py)."""

    def __init__(self, job: Job) -> None:
        """Take the job."""
        spec = job.spec
        assert spec.training is not None, "a phase that trains"
        self.seed = spec.training.seed
        self.taken_cpus = spec.resources.most * spec.resources.cpus_per_worker
        self._job = job
        self._arrivals = Arrivals(job.folder.arrivals, carried=job.stored is not None)
        self._stages: Iterator[Prepared] = iter(())
        self._whole: Prepared | None = None
        self._error: BaseException | None = None
        self._abandoned = False
        self._beats = 0
        self._unread = threading.Event()
        self._thread: threading.Thread | None = None

    # -- what the preparation tells ----------------------------------------------------------------------------------

    def arrived(self, file: str, rows: int, digest: str) -> None:
        """List a file."""
        self._beats += 1
        self._arrivals.add(file, rows, digest)

    def check(self) -> None:
        """Raise Abandoned if the workers have ended, or were asked to."""
        if self._thread is not None and (self._abandoned or self._job.stop.asked):
            raise Abandoned

    def beat(self) -> None:
        """Say that it goes on, to those that wait."""
        self._beats += 1
        self._arrivals.beat()
        self.check()

    def failed(self) -> None:
        """Have the workers save and end; return once they have."""
        if not self._unread.is_set():
            with suppress(OSError):  # then they end where rows do not come
                self._job.folder.request_stop()
        self._arrivals.give_up()
        self._unread.wait()

    # -- what the driver asks ----------------------------------------------------------------------------------------

    def begin(self, stages: Iterator[Prepared]) -> Prepared:
        """Prepare until training may begin, and go on in a thread; return what the workers are sent."""
        self._stages, first = stages, next(stages)
        if first.arriving is None:
            self._whole = first
            self._arrivals.add_all(Path(first.directory), first.train_files, self.seed)
            return replace(first, arriving=Arriving(str(self._arrivals.path), ""))
        away = str(self._job.folder.path / AWAY)
        return replace(first, arriving=replace(first.arriving, files=str(self._arrivals.path), away=away))

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Go on preparing while the workers do what they do within.

        Raises:
            BaseException: what the preparation failed by, if the workers failed too.
        """
        if self._whole is None:
            self._thread = threading.Thread(target=self._go_on, name="tandem-preparation", daemon=True)
            self._thread.start()
        try:
            yield
        except BaseException:
            self.leave()
            raise
        finally:
            self._unread.set()

    def leave(self) -> None:
        """End the preparation: the workers have ended before their last step.

        Raises:
            BaseException: what the preparation failed by, if they ended for that.
        """
        self._abandoned = True
        self._unread.set()
        if self._thread is not None:
            self._thread.join(LEAVE_S)  # what it is at then ends with this process, as if it had been killed
        if self._error is not None and not isinstance(self._error, Abandoned):
            raise self._error

    def whole(self) -> Prepared:
        """Return the data when all of it is prepared; the workers have ended by themselves.

        Raises:
            Stopped: the job was asked to end.
            PreparationHung: it gives no sign of life.
            BaseException: what the preparation failed by.
        """
        if self._thread is not None:
            if self._thread.is_alive():
                progress.say("the workers are done; the rest of the data is prepared: the run's record names all of it")
            self._wait_for(self._thread)
        if isinstance(self._error, Abandoned):
            raise Stopped from self._error
        if self._error is not None:
            raise self._error
        assert self._whole is not None, "the preparation has ended"
        return self._whole

    def _wait_for(self, thread: threading.Thread) -> None:
        longest_s, before = self._job.spec.failures.hang_after_s, -1
        while thread.is_alive():
            if self._beats == before:
                raise PreparationHung(sentence(longest_s, None))
            before = self._beats
            thread.join(longest_s)

    def _go_on(self) -> None:
        try:
            self._whole = next(self._stages)
            self._arrivals.end()
            if self._job.stored:
                self._job.stored.push(self._whole)
        except BaseException as error:
            self._error = error
            self.failed()  # unless it has said so itself: nobody is to wait for ever
