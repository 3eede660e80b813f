"""One forward pass as the runners see it: a flat row of new tokens of several sequences over a paged cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

BLOCK = 32
"""Tokens a block of the cache holds."""


@dataclass(frozen=True)
class Batch:
    """One forward pass: a flat row of tokens of several sequences. All tensors are int32, contiguous, on the CPU."""

    tokens: torch.Tensor
    """[T]: all sequences' new tokens, one sequence after the other."""
    positions: torch.Tensor
    """[T]: each token's place in its sequence."""
    slots: torch.Tensor
    """[T]: where each token's key and value go: block * BLOCK + offset."""
    query_start: torch.Tensor
    """[S + 1]: the tokens of sequence i are [query_start[i], query_start[i + 1])."""
    context: torch.Tensor
    """[S]: tokens of sequence i in the cache after this step, the new ones included."""
    blocks: torch.Tensor
    """[S, most blocks of any]: each sequence's blocks in order, padded with 0."""
    logits_at: torch.Tensor
    """[L]: the rows of the flat row whose logits are wanted, ascending."""
    decoding: int
    """The first `decoding` sequences have exactly one new token."""


class Runner(Protocol):
    """Runs a model's forward pass over a paged cache that it allocates itself. Called from one thread."""

    name: str
    """What logs and reports call it."""
    vocab_size: int
    """Width of the logits: rows of the embedding table."""

    def prepare(self, blocks: int, memory_bytes: int) -> int:
        """Do what the first step would otherwise pay for: allocate the cache, pack, compile, warm.

        Returns how many blocks the cache has, block 0 included: `blocks`, or as many as fit in `memory_bytes`.
        Raises UnsupportedArchitecture where this runner cannot serve the model.
        """
        ...

    def run(self, batch: Batch) -> torch.Tensor:
        """Return the logits [L, vocabulary] of the rows asked for, in float32 or the model's dtype.

        Sequences of one batch may share blocks that one of them fills in this very step, so in every layer all keys
        and values are written before any query attends.
        """
        ...

    def release(self) -> None:
        """Free what only `prepare` and its check needed, such as the model's own copy of packed weights."""
        ...
