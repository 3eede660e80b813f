"""Which of a model's replicas answers a request. Pure but for what it remembers: no I/O, and no clock.

A replica that has read a request's beginning before need not read it again, but one with less to do answers sooner.
Both are counted in the same unit, tokens that a replica reads: what a prompt still needs there, and what the requests
before it cost (`benchmarks/routing.py` measures the exchange). Requests of one session go to one replica, which every
gateway finds by itself: by rendezvous hashing (Thaler and Ravishankar 1998).
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from serve.wire import EmbedCall, GenerateCall, InferCall

Call = GenerateCall | InferCall | EmbedCall

BLOCK_BYTES = 256
"""Prompts are compared in blocks of so much text, 64 tokens or so."""
BYTES_PER_TOKEN = 4
MOST_BLOCKS = 1024
"""Of one prompt; a longer one is told apart by its first 256 KiB."""
REMEMBERED_BLOCKS = 4096
"""Of one replica, the latest: 1 MiB of text, about 260,000 tokens."""
REMEMBERED_REPLICAS = 256
"""The latest that were chosen: with all their blocks some 150 MB."""
REQUEST_COST = 400.0
"""What one more request at a replica of 16 slots costs those beside it, in tokens read."""
FULL_COST = 4.0
"""So many times as much where every slot is taken: the request waits for one."""
USUAL_SLOTS = 16


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

    @property
    def requests(self) -> int:
        """All that it has."""
        return self.own + self.others

    @property
    def busy(self) -> float:
        """Requests for each slot."""
        return self.requests / max(1, self.slots)


def least_busy(candidates: Sequence[Candidate]) -> Candidate:
    """Return the candidate with the least work for each slot; the first of equals."""
    return min(candidates, key=lambda each: each.busy)


class Chooser(Protocol):
    """Decides which replica answers a call."""

    def choose(self, model: str, call: Call, candidates: Sequence[Candidate]) -> Candidate:
        """Return one of the candidates, of which there is at least one; each of them has room for the call."""
        ...


class ByPrefix:
    """The chooser that remembers what each replica has read."""

    def __init__(self) -> None:
        self._read: dict[str, OrderedDict[int, None]] = {}

    def choose(self, model: str, call: Call, candidates: Sequence[Candidate]) -> Candidate:
        """Return the replica for a call, and take note that it will read the call's prompt.

        Calls that are no GenerateCall have nothing in common: the least busy replica is it.
        """
        if not isinstance(call, GenerateCall):
            return least_busy(candidates)
        if len(candidates) == 1 and not self._read:
            return candidates[0]  # nothing to choose, and nothing to learn for later
        blocks = blocks_of(call)
        chosen = self._of_session(call, candidates) or min(candidates, key=lambda each: self._cost(each, blocks))
        self._note(chosen.replica_id, blocks)
        return chosen

    def _of_session(self, call: GenerateCall, candidates: Sequence[Candidate]) -> Candidate | None:
        """Return the session's replica, unless that is full while another is not."""
        if call.session is None:
            return None
        own = by_rendezvous(call.session, candidates)
        return own if own.busy < 1 or least_busy(candidates).busy >= 1 else None

    def _cost(self, candidate: Candidate, blocks: Sequence[int]) -> float:
        unread = len(blocks) - self._matched(candidate.replica_id, blocks)
        return unread * BLOCK_BYTES / BYTES_PER_TOKEN + load_cost(candidate)

    def _matched(self, replica_id: str, blocks: Sequence[int]) -> int:
        """Return how many blocks of a prompt's beginning a replica has read."""
        read: Mapping[int, None] = self._read.get(replica_id, {})
        return next((number for number, block in enumerate(blocks) if block not in read), len(blocks))

    def _note(self, replica_id: str, blocks: Sequence[int]) -> None:
        read = self._read[replica_id] = self._read.pop(replica_id, OrderedDict())  # the last ones are the latest
        for block in blocks:
            read[block] = None
            read.move_to_end(block)
        while len(read) > REMEMBERED_BLOCKS:
            read.popitem(last=False)
        while len(self._read) > REMEMBERED_REPLICAS:
            del self._read[next(iter(self._read))]


def load_cost(candidate: Candidate) -> float:
    """Return what a replica's other requests cost the next one, in tokens read."""
    each = REQUEST_COST * USUAL_SLOTS / max(1, candidate.slots)
    over = max(0, candidate.requests + 1 - candidate.slots)
    return each * (candidate.requests + (FULL_COST - 1) * over)


def by_rendezvous(session: str, candidates: Sequence[Candidate]) -> Candidate:
    """Return the candidate with the highest hash of session and replica: the same one wherever it is asked.

    When a replica comes or goes, only the sessions that it wins or had move.
    """
    return max(candidates, key=lambda each: hashlib.blake2b(f"{session}\0{each.replica_id}".encode()).digest())


def blocks_of(call: GenerateCall) -> list[int]:
    """Return a hash for each whole block of a call's prompt, each of everything up to there."""
    text = _text(call)[: BLOCK_BYTES * MOST_BLOCKS]
    hashes: list[int] = []
    before = 0
    for end in range(BLOCK_BYTES, len(text) + 1, BLOCK_BYTES):
        before = hash((before, text[end - BLOCK_BYTES : end]))
        hashes.append(before)
    return hashes


def _text(call: GenerateCall) -> bytes:
    """Return what a prompt begins with: a conversation that goes on has the beginning of the one before."""
    if isinstance(call.prompt, str):
        return call.prompt.encode(errors="surrogatepass")
    tools = [] if call.tools is None else call.tools.functions
    return json.dumps([tools, call.template_kwargs, call.prompt], default=str).rstrip("]").encode()
