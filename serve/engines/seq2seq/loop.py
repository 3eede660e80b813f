"""The thread that steps: it owns the model and every sequence's rows, and talks to asyncio through two doors.

In: `submit` and `cancel` put messages in an inbox that is emptied between steps.
Out: each step's events go to their event loop in one `call_soon_threadsafe`.

    take the inbox (sleep when there is nothing to do)
    read the sources of sequences for which there are rows; one step of all rows that are there
    choose a token for each sequence, or go on with its beams; close those that end, and drop their rows
    put the new rows to the others
    send what was chosen
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future

import torch

from serve.engines.protocol import EngineError, EngineLoad
from serve.engines.rate import Rate
from serve.engines.seq2seq.decoder import Decoder
from serve.engines.seq2seq.group import Event, Group, advanced, put_together, told, without_closed
from serve.engines.seq2seq.rows import Rows
from serve.engines.seq2seq.sequence import Sequence

MAX_FAILED_STEPS = 3
"""Steps that may fail one after another before the engine declares itself dead."""
logger = logging.getLogger(__name__)


class StepLoop:
    """Run steps in a thread of its own, from `start` to `stop`."""

    def __init__(self, prepare: Callable[[], tuple[Decoder, bool]], max_rows: int, threads: int) -> None:
        """`prepare` is called in the thread: the decoder, and whether rows of several sequences go together."""
        self._prepare = prepare
        self._max_rows = max_rows
        self._threads = threads
        self._decoder: Decoder | None = None
        self._together = True
        self._groups: list[Group] = []
        self._waiting: deque[Sequence] = deque()
        self._inbox: deque[tuple[Callable[[Sequence], None], Sequence]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._failed_steps = 0
        self._outbox: list[tuple[Sequence, Event]] = []
        self._rate = Rate()
        self._thread: threading.Thread | None = None
        self.steps = 0
        """How many there have been."""

    # ---- called from the event loop ----

    def start(self) -> Future[None]:
        """Start the thread; the future is done when the model is ready, or has the error that prevented it."""
        ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(ready,), name="tandem-seq2seq", daemon=True)
        self._thread.start()
        return ready

    @property
    def alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive() and not self._stopping

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises EngineError when the engine does not run."""
        with self._wake:
            if not self.alive:
                raise EngineError("the engine is not running")
            self._inbox.append((self._add, sequence))
            self._wake.notify()

    def cancel(self, sequence: Sequence) -> None:
        """Drop the sequence's rows before the next step; nothing happens if it has ended."""
        with self._wake:
            if not sequence.closed:
                self._inbox.append((self._close, sequence))
                self._wake.notify()

    def stop(self) -> None:
        """End the thread after the step it is in; blocks until it has ended."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()

    def load(self) -> EngineLoad:
        """Return how busy it is; the cache's room is that of its rows, in tokens of both sides."""
        with self._wake:
            arriving = sum(action == self._add for action, _ in self._inbox)
        groups = list(self._groups)
        return EngineLoad(
            running=sum(len(group.sequences) for group in groups),
            waiting=len(self._waiting) + arriving,
            cache_tokens_used=sum(sum(group.rows.lengths) + sum(group.rows.sources) for group in groups),
            cache_tokens_total=0,
            tokens_per_second=self._rate.per_second(),
        )

    # ---- the thread ----

    def _run(self, ready: Future[None]) -> None:
        try:
            torch.set_num_threads(self._threads)  # torch keeps it per calling thread
            self._decoder, self._together = self._prepare()
        except Exception as error:
            self._stopping = True
            ready.set_exception(error)
            return
        ready.set_result(None)
        try:
            while self._take_inbox():
                self._step()
        finally:
            self._stopping = True
            self._fail(self._everything(), "the engine was stopped")

    def _take_inbox(self) -> bool:
        """Act on what arrived, waiting for it when idle; return False when the thread should end."""
        with self._wake:
            while not (self._inbox or self._groups or self._waiting or self._stopping):
                self._wake.wait()
            messages = list(self._inbox)
            self._inbox.clear()
        for action, sequence in messages:
            action(sequence)
        return not self._stopping

    def _step(self) -> None:
        began, running = time.perf_counter(), self._running()
        try:
            admitted = self._admitted()
            running += admitted
            new = self._begun(admitted)
            self._groups = [stepped for group in self._groups if (stepped := self._stepped(group)).sequences]
            groups = [*self._groups, *(group for group in new if group.sequences)]
            self._groups = put_together(groups) if self._together else groups
            self._failed_steps = 0
        except Exception as error:
            logger.exception("a step failed with %d running requests", len(running))
            self._step_failed(running, error)
        self.steps += 1
        ended = time.perf_counter()
        for sequence in running:
            if sequence.request.stats is not None:
                answered = sequence.beams is None or sequence.closed
                sequence.request.stats.ran(began, ended, answered=answered)
        self._send()

    def _admitted(self) -> list[Sequence]:
        """Take sequences out of the queue while there are rows for them, in their order."""
        used, admitted = sum(sequence.width for sequence in self._running()), []
        while self._waiting and used + self._waiting[0].width <= self._max_rows:
            sequence = self._waiting.popleft()
            used += sequence.width
            admitted.append(sequence)
        return admitted

    def _begun(self, sequences: list[Sequence]) -> list[Group]:
        """Read sources, those of fresh sequences together, and choose the first token of each."""
        assert self._decoder is not None
        fresh = [sequence for sequence in sequences if not sequence.tokens]
        parts = [fresh] if self._together and fresh else [[sequence] for sequence in fresh]
        groups = []
        for part in [*parts, *([sequence] for sequence in sequences if sequence.tokens)]:
            sources = [sequence.request.prompt_token_ids for sequence in part]
            rows, logits = self._decoder.begin(sources, part[0].tokens)
            groups.append(self._advanced(part, rows, logits))
        return groups

    def _advanced(self, sequences: list[Sequence], rows: Rows, logits: torch.Tensor) -> Group:
        """Say what the logits (R, V) mean for each sequence; return those that go on, with their rows."""
        group, said = advanced(sequences, rows, logits)
        self._outbox += said
        self._rate.add(len(sequences))
        return group

    def _stepped(self, group: Group) -> Group:
        """Go one token on with a group."""
        assert self._decoder is not None
        group = without_closed(group)
        if not group.sequences:
            return group
        tokens = [token for sequence in group.sequences for token in sequence.next_tokens]
        rows, logits = self._decoder.step(group.rows, tokens)
        return self._advanced(group.sequences, rows, logits)

    def _add(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)

    def _close(self, sequence: Sequence) -> None:
        sequence.closed = True
        if sequence in self._waiting:
            self._waiting.remove(sequence)

    def _running(self) -> list[Sequence]:
        return [each for group in self._groups for each in group.sequences if not each.closed]

    def _step_failed(self, running: list[Sequence], error: Exception) -> None:
        """Fail what ran in the step; after several failures in a row, give up on the model."""
        self._groups = []
        self._fail(running, f"the engine failed in a step: {error!r}")
        self._failed_steps += 1
        if self._failed_steps >= MAX_FAILED_STEPS:
            self._stopping = True
            self._fail(self._everything(), f"the engine died after {self._failed_steps} failed steps: {error!r}")

    def _fail(self, sequences: Iterable[Sequence], message: str) -> None:
        for sequence in sequences:
            if not sequence.closed:
                self._outbox += told(sequence, [EngineError(message)])
        self._send()

    def _everything(self) -> list[Sequence]:
        with self._wake:
            arriving = [sequence for action, sequence in self._inbox if action == self._add]
            self._inbox.clear()
        everything = [*self._running(), *self._waiting, *arriving]
        self._waiting.clear()
        return everything

    def _send(self) -> None:
        """Hand the step's events over, waking each event loop once."""
        events, self._outbox = self._outbox, []
        for loop in {sequence.loop for sequence, _ in events}:
            own = [(sequence, event) for sequence, event in events if sequence.loop is loop]
            try:
                loop.call_soon_threadsafe(_deliver, own)
            except RuntimeError:  # the loop was closed: nobody listens any more
                for sequence, _ in own:
                    sequence.closed = True


def _deliver(events: Iterable[tuple[Sequence, Event]]) -> None:
    for sequence, event in events:
        sequence.events.append(event)
        sequence.arrived.set()
