"""Which of a model's replicas answers a request. Pure: what is known of them is an argument."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from serve.wire import EmbedCall, GenerateCall, InferCall


@dataclass(frozen=True)
class Candidate:
    """A replica that takes requests, as one gateway sees it."""

    replica_id: str
    version: str
    slots: int
    """Sequences that it works on at the same time."""
    own: int
    """Requests that this gateway has there."""
    others: int
    """Requests that it runs or holds for other gateways, as far as it has told."""


def least_busy(candidates: Sequence[Candidate]) -> Candidate:
    """Return the candidate with the least work for each slot; the first of equals."""
    return min(candidates, key=lambda each: (each.own + each.others) / max(1, each.slots))


class Chooser(Protocol):
    """Decides which replica answers a call."""

    def choose(
        self, model: str, call: GenerateCall | InferCall | EmbedCall, candidates: Sequence[Candidate]
    ) -> Candidate:
        """Return one of the candidates, of which there is at least one; each of them has room for the call."""
        ...


class LeastBusy:
    """The chooser that only balances."""

    def choose(
        self, model: str, call: GenerateCall | InferCall | EmbedCall, candidates: Sequence[Candidate]
    ) -> Candidate:
        return least_busy(candidates)
