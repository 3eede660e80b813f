"""Metrics reach the disk first and MLflow second, so that no server can slow a step down or lose one.

    training process     Spool.append(step, {...})       one line to a local file, microseconds, no network
    driver's thread      SpoolSender                     tails every *.jsonl in the folder → log_batch → cursor.json

The cursor moves only after the server took a batch, and MLflow keeps one row per (key, value, time, step), so a batch
whose reply was lost can be sent again. A resumed run that repeats steps does not log them again: the first one counts.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from tracking.errors import Refused
from tracking.records import Cursor, Point, Record, encode, points_to_send, read_records

MAX_BATCH = 1000
"""MLflow's limit of metrics in one request."""
MAX_PAUSE_S = 15.0
_DRAIN_PAUSE_S = 0.2

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """Where points go: a `tracking.run.Run`."""

    def log_points(self, points: Sequence[Point]) -> None: ...
    def set_tags(self, tags: dict[str, str]) -> None: ...


class Spool:
    """Append metrics to one file: one writer for one file, any number of files in a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lost = 0
        """Records that the disk did not take."""
        self._file: BinaryIO | None = None

    def append(self, step: int, metrics: dict[str, float], time_ms: int | None = None) -> None:
        """Write one line. A full disk costs metrics, counted in `lost`, never the run."""
        line = encode(step, metrics, int(time.time() * 1000) if time_ms is None else time_ms)
        try:
            if self._file is None:
                self._file = _open_at_line_start(self.path)
            written = self._file.write(line)
        except OSError as error:
            self._give_up_line(error)
            return
        if written != len(line):
            self._give_up_line(OSError("the disk took only a part of the line"))

    def close(self) -> None:
        """Close the file; a later append opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _give_up_line(self, error: OSError) -> None:
        if self.lost == 0:
            logger.warning("metrics are being lost: cannot write %s: %s", self.path, error)
        self.lost += 1
        self.close()


def _open_at_line_start(path: Path) -> BinaryIO:
    """Open for appending, unbuffered; end the half line that a killed writer may have left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = open(path, "ab+", buffering=0)  # noqa: SIM115 (stays open for the life of the spool)
    if stream.tell() > 0:
        stream.seek(-1, os.SEEK_END)
        if stream.read(1) != b"\n":
            stream.write(b"\n")
    return stream


class SpoolSender:
    """Send what is spooled in `directory` to `run` from one daemon thread, through outages and restarts.

    `run` is a Run, or a function that opens one; such a function is called in the thread until it succeeds, so a
    server that is down when a job starts delays nothing. Requests are `batch_s` apart: each costs the server some 15 ms
    of CPU, however little it brings, and on a laptop the server shares the cores with the training.
    """

    def __init__(
        self,
        directory: Path,
        run: Sink | Callable[[], Sink],
        interval_s: float = 1.0,
        batch_s: float = 2.0,
    ) -> None:
        self.directory = directory
        self.last_error: str | None = None
        """Why the newest attempt failed; None while the server answers."""
        self._run = run
        self._interval_s = interval_s
        self._on_records: Callable[[list[Record]], None] | None = None
        self._batch_s = batch_s
        self._pause_s = batch_s
        self._next_batch = 0.0
        self._cursor_path = directory / "cursor.json"
        self._cursor = Cursor.load(self._cursor_path)
        self._shown = dict(self._cursor.offsets)
        self._deferred: deque[Callable[[Any], object]] = deque()
        self._stopping = threading.Event()
        self._deadline = math.inf
        self._thread = threading.Thread(target=self._loop, name="tandem-spool-sender", daemon=True)

    @property
    def run(self) -> Any | None:
        """The run, or None as long as it could not be opened."""
        return None if callable(self._run) else self._run

    def start(self, on_records: Callable[[list[Record]], None] | None = None) -> SpoolSender:
        """Start the thread and return. `on_records` sees every record once, every `interval_s`, also in an outage."""
        self._on_records = on_records
        self._thread.start()
        return self

    def stop(self, drain_timeout_s: float = 30.0) -> int:
        """Send what is left, for `drain_timeout_s` at most, and return how many records remain unsent on disk."""
        self._deadline = time.monotonic() + drain_timeout_s
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(drain_timeout_s)
        return self.unsent()

    def defer(self, call: Callable[[Any], object]) -> None:
        """Have the thread make `call(run)`, in order, once the server answers: for what is no metric, such as a tag.

        It may be made twice when a reply is lost. Until then it waits in memory: a restarted driver asks again.
        """
        self._deferred.append(call)

    def unsent(self) -> int:
        """Count the complete records, and the deferred calls, that have not reached the server yet."""
        records, _ = read_records(self.directory, self._cursor.offsets, limit=1 << 62)
        return len(records) + len(self._deferred)

    def _loop(self) -> None:
        while time.monotonic() < self._deadline:
            stopping = self._stopping.is_set()
            self._show()
            more = (stopping or time.monotonic() >= self._next_batch) and self._attempt()
            if stopping and not more and self.last_error is None:
                return
            if not more:
                self._wait()

    def _attempt(self) -> bool:
        """Send one batch and settle when the next one is due; True if that is at once."""
        try:
            more = self._send_batch()
            self._pause_s, self.last_error = self._batch_s, None
        except Exception as error:  # the only writer must outlive whatever goes wrong with one attempt
            self._note(error)
            more = False
            self._pause_s = min(2 * self._pause_s, MAX_PAUSE_S)
        self._next_batch = 0.0 if more else time.monotonic() + self._pause_s
        return more

    def _send_batch(self) -> bool:
        """Send what the cursor has not passed, up to MAX_BATCH, and move it; True if there may be more."""
        self._make_deferred_calls()
        records, offsets = read_records(self.directory, self._cursor.offsets, MAX_BATCH)
        if offsets == self._cursor.offsets:
            return bool(self._deferred)
        cursor = Cursor(offsets, dict(self._cursor.last_step), dict(self._cursor.not_finite))
        self._send(points_to_send(records, cursor), cursor)
        with suppress(OSError):  # a full disk: what it does not note is sent again, which MLflow does not mind
            cursor.save(self._cursor_path)
        self._cursor = cursor
        return sum(len(record.metrics) for record in records) >= MAX_BATCH

    def _send(self, points: list[Point], cursor: Cursor) -> None:
        run = self._opened()
        for start in range(0, len(points), MAX_BATCH):
            run.log_points(points[start : start + MAX_BATCH])
        news = cursor.not_finite.items() - self._cursor.not_finite.items()
        if news:
            run.set_tags({f"tandem.not_finite.{key}": text for key, text in news})

    def _make_deferred_calls(self) -> None:
        while self._deferred:
            try:
                self._deferred[0](self._opened())
            except Refused as error:
                logger.warning("not logged: %s", error)
            self._deferred.popleft()

    def _opened(self) -> Sink:
        if callable(self._run):
            self._run = self._run()
        return self._run

    def _show(self) -> None:
        """Hand new records to `on_records`; its mistakes are its own and stop nothing."""
        if self._on_records is None:
            return
        try:
            records, self._shown = read_records(self.directory, self._shown, limit=1 << 62)
            if records:
                self._on_records(records)
        except Exception:
            logger.exception("could not show the newest records of %s", self.directory)

    def _note(self, error: Exception) -> None:
        if self.last_error is None:
            logger.warning("metrics wait on disk in %s until the server answers: %s", self.directory, error)
        self.last_error = str(error)

    def _wait(self) -> None:
        """Wait for the next look; `stop` cuts a wait short, and then looks follow each other quickly."""
        if self._stopping.wait(self._interval_s):
            time.sleep(_DRAIN_PAUSE_S)
