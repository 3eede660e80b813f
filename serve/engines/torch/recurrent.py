"""RecurrentRunner: one step of a model that carries a state along a text, over a cache of states.

A text's state is kept once for each of its blocks: behind the last of its tokens that lie in the block. So a text goes
on from its last block's state, and one that shares the full blocks of another's beginning goes on from theirs: the
scheduler, its prefixes and its preemption are those of models with keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from serve.engines.torch.batch import Batch, Outputs
from serve.engines.torch.blocks import BLOCK
from serve.engines.torch.check import BLOCKS, UnsupportedArchitecture
from serve.engines.torch.kv_cache import allocate
from serve.engines.torch.linear import Weights


@runtime_checkable
class Recurrent(Protocol):
    """What a model has beside that carries a state along a text (jobs/tasks/lstm.py)."""

    state_shape: tuple[int, ...]
    """The shape of a text's state."""

    def recur(
        self, input_ids: torch.Tensor, lengths: torch.Tensor, state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Read on in B texts: ids (B, T) of `lengths` (B,) tokens, states (B, *state_shape) → hidden (B, T, H), states.

        The states are those behind each text's last token.
        """
        ...


@dataclass(frozen=True)
class Segment:
    """Tokens of one sequence within one block, to be read in one go."""

    start: int
    """The first one's place in the batch's flat row."""
    count: int
    source: int | None
    """The block whose state they go on from; None where the text begins."""
    target: int
    """The block that they lie in, which gets the state behind them."""


class RecurrentRunner:
    """Takes the model as it is."""

    name = "recurrent"

    def __init__(self, model: Any, weights: Weights, compiled: bool) -> None:
        self._model = model
        self._weights, self._compiled = weights, compiled
        self._device = torch.device(model.device)
        self._states = torch.empty(0)
        self.vocab_size = int(model.get_input_embeddings().num_embeddings)
        self.embeds = True

    @property
    def cache(self) -> list[torch.Tensor]:
        """See Runner: one tensor, [blocks, *state_shape]."""
        return [self._states]

    def prepare(self, blocks: int, memory_bytes: int) -> int:
        """See Runner. Allocates the states."""
        if self._weights != "bf16":
            raise self._refusal(f"has no layers that are kept in {self._weights}: set precision to bf16, fp32 or auto")
        if self._compiled:
            raise self._refusal("is not compiled: leave `compile` out")
        shape = self._model.state_shape
        block_bytes = self._model.dtype.itemsize * torch.Size(shape).numel()
        blocks = max(BLOCKS, min(blocks, memory_bytes // block_bytes))
        self._states = allocate((blocks, *shape), self._model.dtype, self._device)
        return blocks

    @torch.inference_mode()
    def run(self, batch: Batch) -> Outputs:
        """See Runner: logits (L, vocabulary) and hidden states (E, hidden)."""
        tokens = batch.tokens.to(self._device).long()
        hidden: torch.Tensor | None = None
        for wave in waves(segments(batch)):
            found = self._read(tokens, wave)
            if hidden is None:
                hidden = found.new_empty(len(tokens), found.shape[-1])
            for row, segment in zip(found, wave, strict=True):
                hidden[segment.start : segment.start + segment.count] = row[: segment.count]
        assert hidden is not None, "a step has tokens"
        logits = self._model.get_output_embeddings()(hidden[batch.logits_at.to(self._device).long()])
        return Outputs(logits, hidden[batch.hidden_at.to(self._device).long()])

    def _read(self, tokens: torch.Tensor, wave: list[Segment]) -> torch.Tensor:
        """Read segments that do not wait for each other, and keep their states; return the hidden states (B, T, H)."""
        longest = max(segment.count for segment in wave)
        places = torch.tensor([[min(at, s.count - 1) + s.start for at in range(longest)] for s in wave])
        lengths = torch.tensor([segment.count for segment in wave])
        before = self._states[torch.tensor([segment.source or 0 for segment in wave], device=self._device)]
        begins = torch.tensor([segment.source is None for segment in wave], device=self._device)
        before[begins] = 0
        found, after = self._model.recur(tokens[places.to(self._device)], lengths, before)
        self._states[torch.tensor([segment.target for segment in wave], device=self._device)] = after
        hidden: torch.Tensor = found
        return hidden

    def _refusal(self, reason: str) -> UnsupportedArchitecture:
        return UnsupportedArchitecture(f"{type(self._model).__name__} carries a state along a text, and {reason}")

    def release(self) -> None:
        """Nothing: the model's weights are the ones that compute."""


def segments(batch: Batch) -> list[Segment]:
    """Cut the new tokens [T] of each sequence where its blocks end; a sequence's segments are in their order."""
    found = []
    starts, context, blocks = batch.query_start.tolist(), batch.context.tolist(), batch.blocks.tolist()
    for own, first, last, end in zip(blocks, starts, starts[1:], context, strict=False):
        at = end - (last - first)
        while at < end:
            count = min(end, (at // BLOCK + 1) * BLOCK) - at
            source = own[(at - 1) // BLOCK] if at else None
            found.append(Segment(last - (end - at), count, source, own[at // BLOCK]))
            at += count
    return found


def waves(found: list[Segment]) -> list[list[Segment]]:
    """Put segments into rounds: each comes in the round after that of the one that writes what it reads.

    A block is written once in a step. What one of them reads another sequence may fill in this very step: they share
    a beginning, and the one that fills it was admitted before.
    """
    written: dict[int, int] = {}
    rounds: list[list[Segment]] = []
    for segment in found:
        at = written.get(segment.source, -1) + 1 if segment.source is not None else 0
        written[segment.target] = at
        if at == len(rounds):
            rounds.append([])
        rounds[at].append(segment)
    return rounds
