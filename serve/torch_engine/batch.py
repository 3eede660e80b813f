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
    """Runs a model's forward pass over a paged cache it owns the layout of."""

    def run(self, batch: Batch) -> torch.Tensor:
        """Return the logits [L, vocabulary] of the rows asked for, in float32 or the model's dtype."""
        ...

    def prepare(self) -> None:
        """Do what the first step would otherwise pay for: packing, compiling, warming."""
        ...

    def check(self) -> None:
        """Raise ValueError where the model cannot be served by this runner."""
        ...
