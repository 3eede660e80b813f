"""The thread that steps: it owns the model, the scheduler and every sequence, and talks to asyncio through two doors.

In: `submit` and `cancel` put messages in an inbox that is emptied between steps.
Out: each step's events go to their event loop in one `call_soon_threadsafe`, by a second thread. Waking an event loop
hands it Python's lock, and the next step would wait until all texts are written; so the step begins first.

    take the inbox (sleep when there is nothing to do)
    ask the scheduler for a step, run it
    choose a token for each sequence that completes, close those that end
    send what was chosen

Text is made of the tokens by whoever listens, beside the next step.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

import torch

from serve.engines.protocol import EngineError, EngineLoad
from serve.engines.rate import Rate
from serve.engines.torch import pooling, steps
from serve.engines.torch.batch import Runner, build
from serve.engines.torch.blocks import BLOCK, BlockPool
from serve.engines.torch.completion import Completion, Event, advance
from serve.engines.torch.pages import PageTaker
from serve.engines.torch.pooling import Embedded, Pooled
from serve.engines.torch.scheduler import Scheduler, Sequence

MAX_FAILED_STEPS = 3
"""Steps that may fail one after another before the engine declares itself dead."""

logger = logging.getLogger(__name__)
Said = Event | Embedded


class StepLoop:
    """Run steps in a thread of its own, from `start` to `stop`."""

    def __init__(self, prepare: Callable[[], tuple[Runner, Scheduler]], eos: frozenset[int], threads: int) -> None:
        self._prepare = prepare
        self._runner: Runner | None = None
        self._scheduler = Scheduler(BlockPool(1), max_running=1, prefill_tokens=1)  # until there is a cache
        self._eos = eos
        self._threads = threads
        self._inbox: deque[tuple[Callable[[Sequence], None], Sequence]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._failed_steps = 0
        self._outbox: list[tuple[Sequence, Said]] = []
        self._post: SimpleQueue[list[tuple[Sequence, Said]] | None] = SimpleQueue()
        self._rate = Rate()
        self._noted = 0
        """How many sequences there are of whose steps somebody wants to know."""
        self._thread: threading.Thread | None = None
        self._output_thread = threading.Thread(target=self._carry, name="tandem-outputs", daemon=True)
        self.seconds: defaultdict[str, float] = defaultdict(float)
        """Where the steps' time went: schedule, forward, sample."""

    # ---- called from the event loop ----

    def start(self) -> Future[None]:
        """Start the thread; the future is done when the model is ready, or has the error that prevented it."""
        ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(ready,), name="tandem-engine", daemon=True)
        self._output_thread.start()
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
        """Free the sequence's blocks before the next step; nothing happens if it has ended."""
        with self._wake:
            if not sequence.context.closed:
                self._inbox.append((self._close, sequence))
                self._wake.notify()

    def stop(self) -> None:
        """End the thread after the step it is in; blocks until it has ended."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()
            self._output_thread.join()

    def load(self) -> EngineLoad:
        with self._wake:
            arriving = sum(action == self._add for action, _ in self._inbox)
        pool = self._scheduler.pool
        return EngineLoad(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting) + arriving,
            cache_tokens_used=pool.held * BLOCK,
            cache_tokens_total=pool.total * BLOCK,
            tokens_per_second=self._rate.per_second(),
            preemptions=self._scheduler.preemptions,
            reused_tokens=self._scheduler.reused_tokens,
        )

    # ---- the thread ----

    def _run(self, ready: Future[None]) -> None:
        try:
            # torch keeps the number of threads of a parallel region per calling thread
            torch.set_num_threads(self._threads)
            self._runner, self._scheduler = self._prepare()
        except Exception as error:
            self._stopping = True
            self._post.put(None)
            ready.set_exception(error)
            return
        ready.set_result(None)
        pages = PageTaker(self._runner.cache)
        pages.start()
        try:
            while self._take_inbox():
                self._step()
        finally:
            self._stopping = True
            pages.stop()
            self._fail(self._everything(), "the engine was stopped")
            self._post.put(None)

    def _take_inbox(self) -> bool:
        """Act on what arrived, waiting for it when idle; return False when the thread should end."""
        with self._wake:
            while not (self._inbox or self._busy() or self._stopping):
                self._wake.wait()
            messages = list(self._inbox)
            self._inbox.clear()
        for action, sequence in messages:
            action(sequence)
        return not self._stopping

    def _busy(self) -> bool:
        return bool(self._scheduler.running or self._scheduler.waiting)

    def _add(self, sequence: Sequence) -> None:
        self._noted += sequence.request.stats is not None
        self._scheduler.add(sequence)

    def _step(self) -> None:
        try:
            generated = self._advance()
        except Exception as error:
            logger.exception("a step failed with %d running requests", len(self._scheduler.running))
            self._step_failed(error)
        else:
            self._failed_steps = 0
            self._rate.add(generated)
        self._send()

    def _advance(self) -> int:
        """Run one step and return how many tokens it generated."""
        times, noted, preempted = [time.perf_counter()], self._noted, self._scheduler.preemptions
        step = self._scheduler.next_step()
        if noted and self._scheduler.preemptions > preempted:
            steps.note_preempted(self._scheduler.waiting, self._scheduler.preemptions - preempted)
        if step is None:
            return 0
        batch = build(step)
        times.append(time.perf_counter())
        assert self._runner is not None
        outputs = self._runner.run(batch)
        times.append(time.perf_counter())
        self._scheduler.ran(step)
        self._scheduler.observe_step_time(step, times[2] - times[1])
        chosen = advance(step, outputs.logits, self._eos)
        for sequence, event in [*chosen, *pooling.advance(step, outputs.hidden)]:
            self._say(sequence, event)
        times.append(time.perf_counter())
        if noted:
            steps.note(step, times[0], times[-1])
        for part, start, end in zip(("schedule", "forward", "sample"), times, times[1:], strict=False):
            self.seconds[part] += end - start
        return len(chosen)

    def _say(self, sequence: Sequence, event: Said) -> None:
        """Note what happened to a sequence, and close it if it ended."""
        self._outbox.append((sequence, event))
        if isinstance(event, Exception) or event.finish_reason is not None:
            self._close(sequence)

    def _close(self, sequence: Sequence) -> None:
        """Take a sequence out and free its blocks."""
        if not sequence.context.closed:
            sequence.context.closed = True
            self._noted -= sequence.request.stats is not None
            self._scheduler.remove(sequence)

    def _step_failed(self, error: Exception) -> None:
        """Fail what ran in the step; after several failures in a row, give up on the model."""
        self._fail(list(self._scheduler.running), f"the engine failed in a step: {error!r}")
        self._scheduler.pool.forget()  # the step may not have written what it promised
        self._failed_steps += 1
        if self._failed_steps >= MAX_FAILED_STEPS:
            self._stopping = True
            self._fail(self._everything(), f"the engine died after {self._failed_steps} failed steps: {error!r}")

    def _fail(self, sequences: Iterable[Sequence], message: str) -> None:
        for sequence in sequences:
            if not sequence.context.closed:
                self._say(sequence, EngineError(message))
        self._send()

    def _everything(self) -> list[Sequence]:
        with self._wake:
            arriving = [sequence for action, sequence in self._inbox if action == self._add]
            self._inbox.clear()
        for sequence in arriving:
            self._add(sequence)
        return [*self._scheduler.running, *self._scheduler.waiting]

    def _send(self) -> None:
        if self._outbox:
            self._post.put(self._outbox)  # in C, which keeps Python's lock
            self._outbox = []

    # ---- the output thread ----

    def _carry(self) -> None:
        """Hand each step's events over, waking each event loop once."""
        while (events := self._post.get()) is not None:
            for loop in {sequence.context.loop for sequence, _ in events}:
                own = [(sequence.context, event) for sequence, event in events if sequence.context.loop is loop]
                try:
                    loop.call_soon_threadsafe(_deliver, own)
                except RuntimeError:  # the loop was closed: nobody listens any more
                    for sequence, _ in events:
                        if sequence.context.loop is loop:
                            self.cancel(sequence)


def _deliver(events: Iterable[tuple[Completion | Pooled, Any]]) -> None:
    for completion, event in events:
        completion.events.append(event)
        completion.arrived.set()
