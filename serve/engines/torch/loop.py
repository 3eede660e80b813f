"""The thread that steps: it owns the model, the scheduler and every sequence (serve/engines/step_thread.py).

Events go to their event loop by a second thread. Waking an event loop hands it Python's lock, and the next step would
wait until all texts are written; so the step begins first.

    take the inbox (sleep when there is nothing to do)
    ask the scheduler for a step, run it
    choose a token for each sequence that completes, close those that end
    send what was chosen

Text is made of the tokens by whoever listens, beside the next step.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from queue import SimpleQueue

from serve.engines.protocol import EngineLoad
from serve.engines.step_thread import StepThread, hand_over
from serve.engines.torch import pooling, steps
from serve.engines.torch.batch import Runner, build
from serve.engines.torch.blocks import BLOCK, BlockPool
from serve.engines.torch.completion import Event, advance
from serve.engines.torch.pages import PageTaker
from serve.engines.torch.pooling import Embedded
from serve.engines.torch.scheduler import Scheduler, Sequence

Said = Event | Embedded


class StepLoop(StepThread[Sequence]):
    """Run steps in a thread of its own, from `start` to `stop`."""

    def __init__(self, prepare: Callable[[], tuple[Runner, Scheduler]], eos: frozenset[int], threads: int) -> None:
        super().__init__(threads)
        self._prepare = prepare
        self._runner: Runner | None = None
        self._scheduler = Scheduler(BlockPool(1), max_running=1, prefill_tokens=1)  # until there is a cache
        self._eos = eos
        self._outbox: list[tuple[Sequence, Said]] = []
        self._post: SimpleQueue[list[tuple[Sequence, Said]] | None] = SimpleQueue()
        self._noted = 0
        """How many sequences there are of whose steps somebody wants to know."""
        self._output_thread = threading.Thread(target=self._carry, name="tandem-outputs", daemon=True)
        self.seconds: defaultdict[str, float] = defaultdict(float)
        """Where the steps' time went: schedule, forward, sample."""

    def start(self) -> Future[None]:
        """Start both threads; the future is done when the model is ready, or has the error that prevented it."""
        self._output_thread.start()
        return super().start()

    def stop(self) -> None:
        """End both threads after the step that runs; blocks until they have ended."""
        super().stop()
        if self._thread is not None:
            self._output_thread.join()

    def load(self) -> EngineLoad:
        arriving, pool = self._arriving(), self._scheduler.pool
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

    def _make_ready(self) -> None:
        self._runner, self._scheduler = self._prepare()

    @contextmanager
    def _working(self) -> Iterator[None]:
        assert self._runner is not None
        pages = PageTaker(self._runner.cache)
        pages.start()
        try:
            yield
        finally:
            pages.stop()

    def _forget(self) -> None:
        self._scheduler.pool.forget()  # the step may not have written what it promised

    def _ended(self) -> None:
        self._post.put(None)

    def _advance(self) -> None:
        """Run one step."""
        times, noted, preempted = [time.perf_counter()], self._noted, self._scheduler.preemptions
        step = self._scheduler.next_step()
        if noted and self._scheduler.preemptions > preempted:
            steps.note_preempted(self._scheduler.waiting, self._scheduler.preemptions - preempted)
        if step is None:
            return
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
        self._rate.add(len(chosen))

    # ---- sequences ----

    def _is_closed(self, sequence: Sequence) -> bool:
        return sequence.context.closed

    def _add(self, sequence: Sequence) -> None:
        self._noted += sequence.request.stats is not None
        self._scheduler.add(sequence)

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

    def _in_step(self) -> list[Sequence]:
        return list(self._scheduler.running)

    def _busy(self) -> bool:
        return bool(self._scheduler.running or self._scheduler.waiting)

    def _held(self) -> list[Sequence]:
        return [*self._scheduler.running, *self._scheduler.waiting]

    def _send(self) -> None:
        if self._outbox:
            self._post.put(self._outbox)  # in C, which keeps Python's lock
            self._outbox = []

    # ---- the output thread ----

    def _carry(self) -> None:
        """Hand each step's events over, waking each event loop once."""
        while (events := self._post.get()) is not None:
            gone = hand_over([(sequence.context, event) for sequence, event in events])
            for sequence, _ in events if gone else ():
                if sequence.context in gone:
                    self.cancel(sequence)
