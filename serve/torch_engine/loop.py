"""The thread that steps: it owns the model, the scheduler and every sequence, and talks to asyncio through two doors.

In: `submit` and `cancel` put messages in an inbox that is emptied between steps.
Out: each step's deltas go to their event loop in one `call_soon_threadsafe`.

    take the inbox (sleep when there is nothing to do)
    ask the scheduler for a step, run it
    choose a token for each row that completes, turn it into text
    close the rows that end, send what was said
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from serve.engine import Delta, EngineError, EngineLoad, FinishReason
from serve.torch_engine.runner import ModelRunner
from serve.torch_engine.sampler import RequestSampler, choose
from serve.torch_engine.scheduler import Scheduler, Sequence
from serve.torch_engine.text import TextStream

MAX_FAILED_STEPS = 3
"""Steps that may fail one after another before the engine declares itself dead."""
RATE_WINDOW_S = 5.0

logger = logging.getLogger(__name__)
Event = Delta | EngineError


@dataclass(eq=False)
class Completion:
    """What a sequence needs beside its tokens: how to choose the next one, its text, and who listens."""

    sampler: RequestSampler
    text: TextStream
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    closed: bool = False
    """The last event was sent or nobody listens any more."""


class StepLoop:
    """Run steps in a thread of its own, from `start` to `stop`."""

    def __init__(self, runner: ModelRunner, scheduler: Scheduler, eos: frozenset[int], threads: int) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._eos = eos
        self._threads = threads
        self._inbox: deque[tuple[Callable[[Sequence], None], Sequence]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._failed_steps = 0
        self._outbox: list[tuple[Completion, Event]] = []
        self._generated: deque[tuple[float, int]] = deque()
        self._thread: threading.Thread | None = None

    # ---- called from the event loop ----

    def start(self) -> Future[None]:
        """Start the thread; the future is done when the model is ready, or has the error that prevented it."""
        ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(ready,), name="tandem-engine", daemon=True)
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
            self._inbox.append((self._scheduler.add, sequence))
            self._wake.notify()

    def cancel(self, sequence: Sequence) -> None:
        """Free the sequence's slot before the next step; nothing happens if it has ended."""
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

    def load(self) -> EngineLoad:
        with self._wake:
            self._forget_old_steps()
            tokens = sum(count for _, count in self._generated)
            arriving = sum(action == self._scheduler.add for action, _ in self._inbox)
        cache = self._runner.cache
        return EngineLoad(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting) + arriving,
            cache_tokens_used=self._scheduler.cached_tokens,
            cache_tokens_total=cache.slots * cache.max_context,
            tokens_per_second=tokens / RATE_WINDOW_S,
        )

    # ---- the thread ----

    def _run(self, ready: Future[None]) -> None:
        try:
            # torch keeps the number of threads of a parallel region per calling thread
            torch.set_num_threads(self._threads)
            self._runner.prepare()
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
            while not (self._inbox or self._busy() or self._stopping):
                self._wake.wait()
            messages = list(self._inbox)
            self._inbox.clear()
        for action, sequence in messages:
            action(sequence)
        return not self._stopping

    def _busy(self) -> bool:
        return bool(self._scheduler.running or self._scheduler.waiting)

    def _step(self) -> None:
        try:
            generated = self._advance()
        except Exception as error:
            logger.exception("a step failed with %d running requests", len(self._scheduler.running))
            self._step_failed(error)
        else:
            self._failed_steps = 0
            self._count(generated)
        self._send()

    def _advance(self) -> int:
        """Run one step and return how many tokens it generated."""
        step = self._scheduler.next_step()
        if step is None:
            return 0
        logits = self._runner.forward(step)
        sequences = [chunk.sequence for chunk in step.completing]
        self._scheduler.ran(step)
        if not sequences:
            return 0
        with torch.inference_mode():
            tokens = choose(logits, [sequence.context.sampler for sequence in sequences])
        for sequence, token in zip(sequences, tokens, strict=True):
            self._accept(sequence, token)
        return len(sequences)

    def _accept(self, sequence: Sequence, token: int | None) -> None:
        """Append a token to its sequence, say what it adds, and close the sequence if it ends here."""
        if token is None:
            self._fail([sequence], "the model produced logits that are not finite")
            return
        sequence.tokens.append(token)
        text, finish_reason = self._read(sequence, token)
        delta = Delta(text, (token,), finish_reason, sequence.prompt_tokens, sequence.completion_tokens)
        self._outbox.append((sequence.context, delta))
        if finish_reason is not None:
            self._close(sequence)

    def _read(self, sequence: Sequence, token: int) -> tuple[str, FinishReason | None]:
        """Return the text that a token adds, and why the sequence ends with it, if it does."""
        stream: TextStream = sequence.context.text
        if token in self._eos and not sequence.request.params.ignore_eos:
            return stream.flush(), "stop"
        text = stream.push(token)
        full = sequence.completion_tokens >= sequence.max_tokens
        if full and not stream.stopped:
            text += stream.flush()
        if stream.stopped:
            return text, "stop"
        return text, "length" if full else None

    def _close(self, sequence: Sequence) -> None:
        """Take a sequence out and free its slot."""
        if not sequence.context.closed:
            sequence.context.closed = True
            self._runner.apply(self._scheduler.remove(sequence))

    def _step_failed(self, error: Exception) -> None:
        """Fail what ran in the step; after several failures in a row, give up on the model."""
        self._fail(list(self._scheduler.running), f"the engine failed in a step: {error!r}")
        self._failed_steps += 1
        if self._failed_steps >= MAX_FAILED_STEPS:
            self._stopping = True
            self._fail(self._everything(), f"the engine died after {self._failed_steps} failed steps: {error!r}")

    def _fail(self, sequences: Iterable[Sequence], message: str) -> None:
        for sequence in sequences:
            if not sequence.context.closed:
                self._outbox.append((sequence.context, EngineError(message)))
                self._close(sequence)
        self._send()

    def _everything(self) -> list[Sequence]:
        with self._wake:
            arriving = [sequence for action, sequence in self._inbox if action == self._scheduler.add]
            self._inbox.clear()
        for sequence in arriving:
            self._scheduler.add(sequence)
        return [*self._scheduler.running, *self._scheduler.waiting]

    def _send(self) -> None:
        """Hand the step's events over, waking each event loop once."""
        outbox, self._outbox = self._outbox, []
        for loop in {completion.loop for completion, _ in outbox}:
            events = [(completion, event) for completion, event in outbox if completion.loop is loop]
            try:
                loop.call_soon_threadsafe(_deliver, events)
            except RuntimeError:  # the loop was closed: nobody listens any more
                self._abandon(loop)

    def _abandon(self, loop: asyncio.AbstractEventLoop) -> None:
        for sequence in [*self._scheduler.running, *self._scheduler.waiting]:
            if sequence.context.loop is loop:
                self._close(sequence)

    def _count(self, generated: int) -> None:
        with self._wake:
            self._generated.append((time.monotonic(), generated))
            self._forget_old_steps()

    def _forget_old_steps(self) -> None:
        while self._generated and self._generated[0][0] < time.monotonic() - RATE_WINDOW_S:
            self._generated.popleft()


def _deliver(events: Iterable[tuple[Completion, Event]]) -> None:
    for completion, event in events:
        completion.events.put_nowait(event)
