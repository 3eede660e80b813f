"""The thread of a generative engine: it owns the model and every sequence, and steps from `start` to `stop`.

What a step is, an engine says (serve/engines/torch/loop.py, serve/engines/seq2seq/loop.py). Here is what both have: two
doors to asyncio, and what becomes of sequences when a step fails.

In: `submit` and `cancel` put messages in an inbox that is emptied between steps.
Out: each step's events go to their event loop in one `call_soon_threadsafe`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as ListOf
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, Protocol, TypeVar

import torch

from serve.engines.protocol import EngineError, EngineLoad
from serve.engines.rate import Rate

MAX_FAILED_STEPS = 3
"""Steps that may fail one after another before the engine declares itself dead."""
logger = logging.getLogger(__name__)
S = TypeVar("S")
L = TypeVar("L", bound="Listener")


class Listener(Protocol):
    """Where a sequence's events arrive."""

    loop: asyncio.AbstractEventLoop
    events: deque[Any]
    arrived: asyncio.Event


class StepThread(Generic[S]):
    """Run steps over sequences S. Deriving classes say how one is made ready, added, stepped and closed."""

    name = "tandem-engine"
    """Of the thread."""

    def __init__(self, threads: int) -> None:
        """Take the CPU threads of a step."""
        self._threads = threads
        self._inbox: deque[tuple[Callable[[S], None], S]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._failed_steps = 0
        self._rate = Rate()
        self._thread: threading.Thread | None = None

    # ---- called from the event loop ----

    def start(self) -> Future[None]:
        """Start the thread; the future is done when the model is ready, or has the error that prevented it."""
        ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(ready,), name=self.name, daemon=True)
        self._thread.start()
        return ready

    @property
    def alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive() and not self._stopping

    def submit(self, sequence: S) -> None:
        """Queue a sequence. Raises EngineError when the engine does not run."""
        with self._wake:
            if not self.alive:
                raise EngineError("the engine is not running")
            self._inbox.append((self._add, sequence))
            self._wake.notify()

    def cancel(self, sequence: S) -> None:
        """Take the sequence out before the next step; nothing happens if it has ended."""
        with self._wake:
            if not self._is_closed(sequence):
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
        """Return how busy it is."""
        raise NotImplementedError

    def _arriving(self) -> int:
        """Return how many sequences are in the inbox."""
        with self._wake:
            return sum(action == self._add for action, _ in self._inbox)

    # ---- for deriving classes: what a sequence is, and what a step ----

    def _is_closed(self, sequence: S) -> bool:
        """Tell whether a sequence has ended, or nobody listens any more."""
        raise NotImplementedError

    def _add(self, sequence: S) -> None:
        """Queue a sequence."""
        raise NotImplementedError

    def _close(self, sequence: S) -> None:
        """Take a sequence out; nothing happens if it is closed."""
        raise NotImplementedError

    def _say(self, sequence: S, event: Any) -> None:
        """Note for `_send` what happened to a sequence, and close it if it ended."""
        raise NotImplementedError

    def _send(self) -> None:
        """Hand over what was noted."""
        raise NotImplementedError

    def _in_step(self) -> list[S]:
        """Return the sequences of the step that is under way."""
        raise NotImplementedError

    def _busy(self) -> bool:
        """Tell whether there is a step to take."""
        raise NotImplementedError

    def _held(self) -> list[S]:
        """Return all sequences that were added and not closed."""
        raise NotImplementedError

    def _make_ready(self) -> None:
        """Make the model ready."""
        raise NotImplementedError

    def _working(self) -> AbstractContextManager[None]:
        """Return what is to be entered while there are steps."""
        return nullcontext()

    def _advance(self) -> None:
        """Take one step, and note what it means for its sequences."""
        raise NotImplementedError

    def _after(self, began: float) -> None:
        """Take note of a step that began at `began`, also of one that failed, before what it came to is sent."""

    def _forget(self) -> None:
        """Drop what a failed step may have left half written."""

    def _ended(self) -> None:
        """Do what is left to do when the thread ends."""

    # ---- the thread ----

    def _run(self, ready: Future[None]) -> None:
        try:
            torch.set_num_threads(self._threads)  # torch keeps it per calling thread
            self._make_ready()
        except Exception as error:
            self._stopping = True
            self._ended()
            ready.set_exception(error)
            return
        ready.set_result(None)
        try:
            with self._working():
                while self._take_inbox():
                    self._step()
        finally:
            self._stopping = True
            self._fail(self._everything(), "the engine was stopped")
            self._ended()

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

    def _step(self) -> None:
        began = time.perf_counter()
        try:
            self._advance()
            self._failed_steps = 0
        except Exception as error:
            logger.exception("a step failed with %d running requests", len(self._in_step()))
            self._step_failed(error)
        self._after(began)
        self._send()

    def _step_failed(self, error: Exception) -> None:
        """Fail what ran in the step; after several failures in a row, give up on the model."""
        self._fail(self._in_step(), f"the engine failed in a step: {error!r}")
        self._forget()
        self._failed_steps += 1
        if self._failed_steps >= MAX_FAILED_STEPS:
            self._stopping = True
            self._fail(self._everything(), f"the engine died after {self._failed_steps} failed steps: {error!r}")

    def _fail(self, sequences: Iterable[S], message: str) -> None:
        for sequence in sequences:
            if not self._is_closed(sequence):
                self._say(sequence, EngineError(message))
        self._send()

    def _everything(self) -> list[S]:
        with self._wake:
            arriving = [sequence for action, sequence in self._inbox if action == self._add]
            self._inbox.clear()
        for sequence in arriving:
            self._add(sequence)
        return self._held()


class SteppingEngine(Generic[S]):
    """The part of the Engine protocol that is the thread's."""

    _steps: StepThread[S]

    async def start(self) -> None:
        """Start the thread; returns when the model is ready. Raises what speaks against it."""
        await asyncio.wrap_future(self._steps.start())

    async def stop(self) -> None:
        """Fail what still runs with EngineError, and end the thread."""
        await asyncio.to_thread(self._steps.stop)

    def healthy(self) -> bool:
        return self._steps.alive

    def load(self) -> EngineLoad:
        return self._steps.load()


def hand_over(said: ListOf[tuple[L, Any]]) -> list[L]:
    """Give events to those who listen, waking each event loop once; return those whose loop was closed."""
    gone: list[L] = []
    for loop in {listener.loop for listener, _ in said}:
        own = [(listener, event) for listener, event in said if listener.loop is loop]
        try:
            loop.call_soon_threadsafe(_deliver, own)
        except RuntimeError:  # the loop was closed: nobody listens any more
            gone += [listener for listener, _ in own]
    return gone


def _deliver(said: Iterable[tuple[L, Any]]) -> None:
    for listener, event in said:
        listener.events.append(event)
        listener.arrived.set()
