"""One forward pass as the runners see it: a flat row of new tokens of several sequences over a paged cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from serve.torch_engine.blocks import BLOCK
from serve.torch_engine.scheduler import Chunk, Step

__all__ = ["BLOCK", "Batch", "Runner", "build"]


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


def build(step: Step) -> Batch:
    """Return the batch of a step."""
    chunks = step.chunks
    counts = [chunk.end - chunk.start for chunk in chunks]
    query_start = np.zeros(len(chunks) + 1, np.int32)
    np.cumsum(counts, out=query_start[1:])
    tokens: list[int] = []
    positions: list[int] = []
    for sequence, start, end, _ in chunks:
        tokens += sequence.tokens[start:end]
        positions += range(start, end)
    blocks = _block_table(chunks)
    at = np.array(positions, np.int32)
    row = np.repeat(np.arange(len(chunks)), counts)
    slots = blocks[row, at // BLOCK] * BLOCK + at % BLOCK
    return Batch(
        tokens=torch.from_numpy(np.array(tokens, np.int32)),
        positions=torch.from_numpy(at),
        slots=torch.from_numpy(slots),
        query_start=torch.from_numpy(query_start),
        context=torch.from_numpy(np.array([chunk.end for chunk in chunks], np.int32)),
        blocks=torch.from_numpy(blocks),
        logits_at=torch.from_numpy(_wanted_rows(chunks, query_start)),
        decoding=len(step.decode),
    )


def _block_table(chunks: list[Chunk]) -> np.ndarray:
    most = max(len(chunk.sequence.blocks) for chunk in chunks)
    table = np.zeros((len(chunks), most), np.int32)
    for row, chunk in enumerate(chunks):
        table[row, : len(chunk.sequence.blocks)] = chunk.sequence.blocks
    return table


def _wanted_rows(chunks: list[Chunk], query_start: np.ndarray) -> np.ndarray:
    """Return the rows of the tokens that the next one is chosen after, and all rows of a prompt to be scored."""
    if not any(chunk.sequence.scored for chunk in chunks):
        return query_start[1:][[chunk.completes for chunk in chunks]] - 1
    parts = []
    for row, chunk in enumerate(chunks):
        first, last = query_start[row], query_start[row + 1]
        if chunk.sequence.scored:
            parts.append(np.arange(first, last, dtype=np.int32))
        elif chunk.completes:
            parts.append(np.array([last - 1], np.int32))
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)
