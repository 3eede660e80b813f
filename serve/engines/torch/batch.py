"""One forward pass as the runners see it: a flat row of new tokens of several sequences over a paged cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch

from serve.engines.torch.blocks import BLOCK
from serve.engines.torch.scheduler import Chunk, Step

__all__ = ["BLOCK", "Batch", "Outputs", "Runner", "build"]


def _no_rows() -> torch.Tensor:
    return torch.empty(0, dtype=torch.int32)


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
    hidden_at: torch.Tensor = field(default_factory=_no_rows)
    """[E]: the rows whose last hidden states are wanted, ascending; none of them is in `logits_at`."""


class Outputs(NamedTuple):
    """What a forward pass gives, in float32 or the model's dtype."""

    logits: torch.Tensor
    """[L, vocabulary], of the rows in `logits_at`."""
    hidden: torch.Tensor
    """[E, hidden], of the rows in `hidden_at`: the last layer's output as the head reads it, the final norm applied."""


class Runner(Protocol):
    """Runs a model's forward pass over a paged cache that it allocates itself. Called from one thread."""

    name: str
    """What logs and reports call it."""
    vocab_size: int
    """Width of the logits: rows of the embedding table."""
    embeds: bool
    """Whether it gives hidden states; known once it is prepared."""

    def prepare(self, blocks: int, memory_bytes: int) -> int:
        """Do what the first step would otherwise pay for: allocate the cache, pack, compile, warm.

        Returns how many blocks the cache has, block 0 included: `blocks`, or as many as fit in `memory_bytes`.
        Raises UnsupportedArchitecture where this runner cannot serve the model.
        """
        ...

    def run(self, batch: Batch) -> Outputs:
        """Run the batch and return what it asks for: logits (L, vocabulary), hidden states (E, hidden).

        Sequences of one batch may share blocks that one of them fills in this very step, so in every layer all keys
        and values are written before any query attends.
        """
        ...

    @property
    def cache(self) -> list[torch.Tensor]:
        """The tensors that `prepare` allocated for keys and values; shapes are the runner's own."""
        ...

    def release(self) -> None:
        """Free what only `prepare` and its check needed, such as the model's own copy of packed weights."""
        ...


def build(step: Step) -> Batch:
    """Return the batch of a step; the shapes are those of Batch: S sequences, T new tokens, L rows with logits, E
    with hidden states."""
    chunks = step.chunks
    # a decode step's own Python time counts at hundreds of steps a second, so its tokens go without slices
    tokens = [sequence.tokens[at] for sequence, at, _, _ in step.decode]
    positions = [at for _, at, _, _ in step.decode]
    slots = [sequence.blocks[at // BLOCK] * BLOCK + at % BLOCK for sequence, at, _, _ in step.decode]
    query_start = list(range(len(tokens) + 1))
    for sequence, start, end, _ in step.prefill:
        tokens += sequence.tokens[start:end]
        positions += range(start, end)
        slots += [sequence.blocks[at // BLOCK] * BLOCK + at % BLOCK for at in range(start, end)]
        query_start.append(len(tokens))
    return Batch(
        tokens=_int32(tokens),
        positions=_int32(positions),
        slots=_int32(slots),
        query_start=_int32(query_start),
        context=_int32([chunk.end for chunk in chunks]),
        blocks=torch.from_numpy(_block_table(chunks)),
        logits_at=_int32(_wanted_rows(chunks, query_start)),
        decoding=len(step.decode),
        hidden_at=_int32(_pooled_rows(chunks, query_start)),
    )


def _int32(values: list[int]) -> torch.Tensor:
    return torch.from_numpy(np.array(values, np.int32))


def _block_table(chunks: list[Chunk]) -> np.ndarray:
    blocks = [chunk.sequence.blocks for chunk in chunks]
    table = np.zeros((len(blocks), max(map(len, blocks))), np.int32)
    for row, own in zip(table, blocks, strict=True):
        row[: len(own)] = own
    return table


def _wanted_rows(chunks: list[Chunk], query_start: list[int]) -> list[int]:
    """Return the rows of the tokens that the next one is chosen after, and all rows of a prompt to be scored."""
    if not any(chunk.sequence.read_whole for chunk in chunks):
        return [end - 1 for end, chunk in zip(query_start[1:], chunks, strict=True) if chunk.completes]
    rows: list[int] = []
    for at, chunk in enumerate(chunks):
        if chunk.sequence.scored:
            rows += range(query_start[at], query_start[at + 1])
        elif chunk.completes and not chunk.sequence.pooled:
            rows.append(query_start[at + 1] - 1)
    return rows


def _pooled_rows(chunks: list[Chunk], query_start: list[int]) -> list[int]:
    """Return all rows of the texts that become embeddings."""
    pooled = (at for at, chunk in enumerate(chunks) if chunk.sequence.pooled)
    return [row for at in pooled for row in range(query_start[at], query_start[at + 1])]
