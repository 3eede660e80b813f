"""What an engine did for one request, step by step: noted only where somebody wants to know.

Whoever wants to know calls `begin` in the task that works on the request; an engine finds the record there (`current`)
and fills it in. Without a record nothing is noted, and no clock is read.
"""

from __future__ import annotations

import time
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(eq=False)
class RequestStats:
    """Times are those of `time.perf_counter`. A request of several texts or rows has one record for all of them."""

    submitted: float | None = None
    """When it was handed to the engine."""
    scheduled: float | None = None
    """When the first step began that it was a part of."""
    first_output: float | None = None
    """When the engine had its first token, vector or prediction."""
    last_output: float | None = None
    steps: int = 0
    """Steps that it was a part of; those of its texts are added up."""
    steps_to_first: int = 0
    """Of these, those up to its first output."""
    cached_tokens: int = 0
    """Tokens of its prompt that were in the cache already when it was first scheduled."""
    preemptions: int = 0
    """How often it gave its room back and was computed again."""

    def submit(self) -> None:
        """Note that it is handed to the engine now."""
        if self.submitted is None:
            self.submitted = time.perf_counter()

    def ran(self, began: float, ended: float, cached: int = 0, answered: bool = True) -> None:
        """Note a step that it was a part of.

        Args:
            cached: tokens of it that were in the cache before the step.
            answered: whether the step yielded something.
        """
        if self.scheduled is None:
            self.scheduled, self.cached_tokens = began, cached
        self.steps += 1
        if answered:
            if self.first_output is None:
                self.first_output, self.steps_to_first = ended, self.steps
            self.last_output = ended


_current: ContextVar[RequestStats | None] = ContextVar("tandem_request_stats", default=None)


def begin() -> RequestStats:
    """Return a new record, which engines fill in from now on for what this task asks of them."""
    stats = RequestStats()
    _current.set(stats)
    return stats


def over() -> None:
    """End that."""
    _current.set(None)


def current() -> RequestStats | None:
    """Return the record that is to be filled in; None: nobody wants to know."""
    return _current.get()
