"""What one gateway knows of the work for one model: a request's tokens from its arrival to its end. Pure.

A request is expected to generate what answers have had lately, and no more than its `max_tokens`; what it generates
beyond that has arrived as well, and what it does not generate is taken back at its end. So many requests that name a
large `max_tokens`, or none, and generate little are little work.
"""

from __future__ import annotations

from serve.wire import Work

FIRST_GUESS = 256.0
"""Tokens of an answer, before there was one."""
MEAN_OF = 30
"""Answers that the mean goes back."""


class ModelWork:
    """The work for one model. Sums are kept as they change, so that telling costs the same with any number of them."""

    def __init__(self) -> None:
        self.arrived = self.done = self.waiting = self.running = 0.0
        self.requests = 0
        """Requests that have begun and not ended."""
        self._mean = FIRST_GUESS
        self._answers = 0

    def begin(self, prompt: float, most: float | None) -> Item:
        """Take note of a request that has come.

        Args:
            prompt: its tokens, as far as they are known; of one that asks for predictions, its rows.
            most: tokens that it may generate; None: it does not say; 0: it generates nothing.
        """
        item = Item(self, prompt, self._mean if most is None else min(most, self._mean), generates=most != 0)
        self.requests += 1
        self.arrived += item.needs
        self.waiting += item.needs
        return item

    def told(self) -> Work:
        """Return what the gateway reports."""
        return Work(self.arrived, self.done, max(0.0, self.waiting), max(0.0, self.running))

    def answered(self, generated: int) -> None:
        """Take note of how long an answer was."""
        self._answers = min(MEAN_OF, self._answers + 1)
        self._mean += (generated - self._mean) / self._answers

    def ended(self) -> None:
        """One request less. Without any, what sums of fractions have left over is nothing."""
        self.requests -= 1
        if not self.requests:
            self.waiting = self.running = 0.0


class Item:
    """One request: `started`, `generated` and `end`, in this order."""

    __slots__ = ("_ended", "_expected", "_generated", "_generates", "_prompt", "_running", "_work")

    def __init__(self, work: ModelWork, prompt: float, expected: float, generates: bool) -> None:
        self._work, self._prompt, self._expected, self._generates = work, prompt, expected, generates
        self._generated = 0
        self._running = self._ended = False

    @property
    def needs(self) -> float:
        """Tokens from the prompt to the end, as far as they are known."""
        return self._prompt + self._expected

    def started(self, prompt: float | None = None) -> None:
        """A replica works on it; `prompt`: how many tokens the prompt really has."""
        if self._ended:
            return
        work = self._work
        if not self._running:
            self._running = True
            work.waiting -= self.needs
            work.running += self.needs
            if self._generates:
                self._read(self._prompt if prompt is None else prompt)
        elif prompt is not None and not self._generates:
            work.arrived += prompt - self._prompt
            work.running += prompt - self._prompt
            self._prompt = prompt

    def _read(self, prompt: float) -> None:
        """Count the prompt of a text to generate as worked off: the first token comes with its end."""
        self._work.arrived += prompt - self._prompt
        self._work.running -= self._prompt
        self._work.done += prompt
        self._prompt = prompt

    def generated(self, total: int) -> None:
        """It has generated so many tokens in all."""
        if not self._running or self._ended or total <= self._generated:
            return
        work, beyond = self._work, total - self._expected
        work.done += total - self._generated
        work.running -= min(total, self._expected) - self._generated
        if beyond > 0:
            work.arrived += beyond
            self._expected = total
        self._generated = total

    def end(self, answered: bool = True) -> None:
        """It is over. A second time does nothing.

        Args:
            answered: whether predictions or vectors came of it; a text is what it has generated.
        """
        if self._ended:
            return
        self._ended = True
        work = self._work
        if not self._running:
            work.arrived -= self.needs
            work.waiting -= self.needs
        elif self._generates:
            left = self._expected - self._generated
            work.arrived -= left
            work.running -= left
            if self._generated:
                work.answered(self._generated)
        else:
            work.running -= self._prompt
            work.done += self._prompt if answered else 0.0
            work.arrived -= 0.0 if answered else self._prompt
        work.ended()
