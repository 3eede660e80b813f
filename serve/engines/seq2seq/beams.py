"""Beam search of one sequence, as transformers' `generate` does it by default. Pure.

A hypothesis is scored by its summed log-probability over its number of tokens, the end among them. The search ends
when as many have ended as there are beams, and the best that goes on, as it stands, is worse than the worst of these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Hypothesis(NamedTuple):
    """Tokens, the summed log-probability, and whether an end token is the last."""

    tokens: tuple[int, ...]
    total: float
    ended: bool

    @property
    def score(self) -> float:
        """What hypotheses are compared by."""
        return self.total / max(len(self.tokens), 1)


@dataclass
class Beams:
    """The hypotheses of a sequence: those that go on, one a row, and the best of those that have ended."""

    width: int
    longest: int
    """Tokens of a text; a hypothesis of so many has ended too."""
    ends: frozenset[int]
    running: tuple[Hypothesis, ...] = (Hypothesis((), 0.0, False),)
    finished: tuple[Hypothesis, ...] = ()
    """Best first."""

    @property
    def best(self) -> Hypothesis | None:
        """The answer, where the search is over."""
        if self.running and (len(self.finished) < self.width or self._may_improve()):
            return None
        return self.finished[0]

    def advance(self, logits: np.ndarray) -> list[int]:
        """Go one token on; return for each hypothesis that goes on the row that it comes from.

        Args:
            logits: (R, V) fp32, of the tokens that follow `running`.
        """
        candidates = self._candidates(_log_softmax(logits))
        length = len(self.running[0].tokens) + 1
        over = [each for _, each in candidates[: self.width] if each.ended or length == self.longest]
        on = [] if length == self.longest else [(row, each) for row, each in candidates if not each.ended]
        self.finished = tuple(sorted([*self.finished, *over], key=lambda each: -each.score)[: self.width])
        self.running = tuple(each for _, each in on[: self.width])
        return [row for row, _ in on[: self.width]]

    def _candidates(self, logprobs: np.ndarray) -> list[tuple[int, Hypothesis]]:
        """Return the best continuations with their rows, best first: enough for `width` of them to go on."""
        totals = logprobs + np.array([each.total for each in self.running])[:, None]
        flat = totals.ravel()
        count = min(self.width * (1 + len(self.ends)), len(flat))
        best = np.argpartition(-flat, count - 1)[:count]
        found = []
        for at in best[np.argsort(-flat[best], kind="stable")].tolist():
            row, token = divmod(at, logprobs.shape[1])
            tokens = (*self.running[row].tokens, token)
            found.append((row, Hypothesis(tokens, float(flat[at]), token in self.ends)))
        return found

    def _may_improve(self) -> bool:
        return self.running[0].score > self.finished[-1].score


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result
